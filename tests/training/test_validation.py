"""Held-out images, what a run reports, the dry run, the way to the Hub."""

import json
import math
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from training.cache_latents import cache_latents
from training.data.held_out import hold_out
from training.data.latent_cache import CacheError, LatentCache
from training.dry_run import CPU_ATTENTION, describe, measure
from training.outputs.metrics import Stopwatch, Window, smooth
from training.outputs.publish import PublishError, check_repository
from training.settings.config import ConfigError, TrainConfig, to_dict
from training.train import main
from training.trainer import Trainer


def train(config: TrainConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def lines(output: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / name).read_text().splitlines()]


# --- held-out images ---


def test_training_and_held_out_images_are_a_partition_by_class(cache: LatentCache) -> None:
    training, held_out = hold_out(cache, 0.4, seed=0)
    assert sorted([*training.rows, *held_out.rows]) == list(range(len(cache)))
    assert np.bincount(held_out.labels).tolist() == [2, 4, 1]
    for part in (training, held_out):
        for index, row in enumerate(part.rows):
            assert part.labels[index] == cache.labels[row]
            assert torch.equal(part.moments(index, 1)[0], cache.moments(int(row), 1)[0])
    again = hold_out(cache, 0.4, seed=0)[1]
    assert np.array_equal(again.rows, held_out.rows)
    assert not np.array_equal(hold_out(cache, 0.4, seed=1)[1].rows, held_out.rows)


def test_a_class_keeps_an_image_to_train_on_and_something_must_be_held_out(cache: LatentCache) -> None:
    assert np.bincount(hold_out(cache, 0.99, seed=0)[0].labels).tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"validation.fraction is 0.01: of no class"):
        hold_out(cache, 0.01, seed=0)


def test_validation_repeats_its_draws_and_leaves_training_alone(make_config) -> None:
    """With a learning rate too small to matter, raw and averaged weights and every step have one and the same loss."""
    options = {"optimizer.learning_rate": 1e-30, "model.dropout": 0.5, "schedule.steps": 3}
    config = make_config(**options, **{"validation.fraction": 0.4, "validation.every": 1})
    train(config)
    found = lines(config.output, "validation.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    values = {round(line[name], 6) for line in found for name in ("validation_loss_raw", "validation_loss_ema")}
    assert len(values) == 1
    rarely = make_config("rarely", **options, **{"validation.fraction": 0.4, "validation.every": 100})
    train(rarely)
    assert [line["step"] for line in lines(rarely.output, "validation.jsonl")] == [3]
    curves = [[line["loss"] for line in lines(each.output, "metrics.jsonl")] for each in (config, rarely)]
    assert curves[0] == curves[1]


def test_validation_loss_falls_with_training_and_differs_for_averaged_weights(make_config) -> None:
    options = {"validation.fraction": 0.3, "validation.every": 1, "schedule.steps": 40, "data.batch_size": 8}
    config = make_config(**options, **{"checkpoints.every": 100})
    train(config)
    found = lines(config.output, "validation.jsonl")
    assert found[-1]["validation_loss_raw"] < 0.95 * found[0]["validation_loss_raw"]
    assert found[-1]["validation_loss_raw"] != found[-1]["validation_loss_ema"]


def test_the_batch_split_over_processes_gives_the_same_validation_loss(make_config) -> None:
    """Two halves of each batch, as two processes take them, average to the whole."""
    trainer = Trainer(make_config(**{"validation.fraction": 0.4}))
    validation = trainer.validation
    whole = validation.loss(trainer.module)
    validation.batches.batch_size //= 2
    halves = []
    for rank in range(2):
        validation.batches.rank = rank
        halves.append(validation.loss(trainer.module))
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-4)  # rounding; the halves differ by percents


def test_another_cache_can_validate_if_it_fits(make_config, data_config, tmp_path: Path) -> None:
    from dataclasses import replace

    other = cache_latents(replace(data_config, cache=str(tmp_path / "other"), mirror=False, dtype="float16"))
    config = make_config(**{"validation.cache": str(other.folder), "validation.images": 6})
    trainer = Trainer(config)
    assert len(trainer.data) == 17
    assert len(trainer.validation.batches.data) == 6
    fewer = cache_latents(replace(data_config, cache=str(tmp_path / "fewer"), classes=["1", "2"]))
    with pytest.raises(CacheError, match="classes is"):
        Trainer(make_config("second", **{"validation.cache": str(fewer.folder)}))


# --- reports ---


def test_the_share_outside_the_passes_is_what_the_stopwatch_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.0, 7.0, 10.0, 10.0])
    monkeypatch.setattr("training.outputs.metrics.time.perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.clear = lambda: None  # type: ignore[method-assign]
    window = Window(images_per_step=20, watch=watch)
    with watch.timing("data"):
        pass
    with watch.timing("passes"):
        pass
    window.add(torch.tensor([1.0]), 2.0)
    values = window.summary()
    assert (values["data_fraction"], values["outside_fraction"]) == pytest.approx((0.2, 0.6))
    assert values["images_per_second"] == pytest.approx(2.0)


def test_bad_steps_leave_no_hole_in_the_reports() -> None:
    assert smooth([1.0, float("nan"), 1.0, float("inf")], 0.9) == pytest.approx([1.0] * 4)
    window = Window(images_per_step=1, watch=Stopwatch(torch.device("cpu")))
    for loss, norm in ((1.0, 2.0), (float("nan"), float("inf")), (3.0, 4.0)):
        window.add(torch.tensor([loss]), norm)
    values = window.summary()
    assert (values["loss"], values["grad_norm"]) == (2.0, 3.0)
    window.add(torch.tensor([float("nan")]), float("nan"))
    assert all(math.isnan(window.summary()[name]) for name in ("loss",))


def test_a_run_reports_where_its_time_went(make_config) -> None:
    config = make_config(**{"schedule.steps": 2})
    train(config)
    for line in lines(config.output, "metrics.jsonl"):
        assert 0 < line["data_fraction"] < line["outside_fraction"] < 1


def test_tensorboard_gets_scalars_and_sample_grids(make_config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preview = {"every": 2, "labels": [0, 2], "rows": 1, "num_inference_steps": 1}
    config = make_config(**{"schedule.steps": 2, "validation.fraction": 0.3, "preview": preview})
    train(config)
    events = EventAccumulator(str(Path(config.output) / "tensorboard" / "transdiff")).Reload()
    scalars = {"loss", "learning_rate", "images_per_second", "outside_fraction", "validation_loss_ema"}
    assert scalars <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"samples_raw", "samples_ema"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_trackers_that_are_not_there_are_an_error(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="trackers names 'paper'; valid names: .*wandb"):
        Trainer(make_config(trackers=["paper"]))
    monkeypatch.setattr("training.outputs.trackers.get_available_trackers", list)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Trainer(make_config(trackers=["wandb"]))
    config = make_config(trackers=[], **{"schedule.steps": 1})
    train(config)
    assert not (Path(config.output) / "tensorboard").exists()


# --- dry run ---


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_dry_run_counts_what_a_real_pass_does(make_config, patch_size: int) -> None:
    trainer = Trainer(make_config(**{"model.patch_size": patch_size, "model.dropout": 0.0}))
    batch = trainer.batches[0]
    flops, activations = measure(trainer, batch)
    kept: dict[int, torch.UntypedStorage] = {}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value: kept.setdefault(value.untyped_storage()._cdata, value.untyped_storage()) and value,
            lambda value: value,
        ):
            loss = trainer.module.eval()(**batch).mean()
        weights = {value.untyped_storage()._cdata for value in trainer.module.parameters()}
        loss.backward()
    assert flops == counter.get_total_flops() > 0
    real = sum(storage.nbytes() for number, storage in kept.items() if number not in weights)
    assert activations == pytest.approx(real, rel=0.05)


def test_the_dry_run_describes_and_writes_nothing(make_config) -> None:
    config = make_config(**{"optimizer.gradient_accumulation": 3, "schedule.steps": 7, "model.patch_size": 2})
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    text = describe(trainer)
    count = sum(value.numel() for value in trainer.module.transformer.parameters())
    assert f"transformer: {count:,} parameters, {count:,} of them trained" in text
    assert "global batch: 12 groups of 4 image(s): 4 x 1 process(es) x 3 accumulation step(s)" in text
    assert "schedule: 7 steps" in text
    assert "latents (4, 4, 4, 4, 4) float32" in text
    assert all(torch.equal(before[name], value) for name, value in trainer.module.state_dict().items())
    assert all(value.grad is None for value in trainer.module.parameters())
    assert not Path(config.output).exists()


def test_the_command_line_takes_dry_run(make_config, tmp_path: Path, monkeypatch, capsys) -> None:
    config = make_config()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["training.train", "--dry-run", f"--config={file}"])
    main()
    assert "dry run: nothing is trained or written" in capsys.readouterr().out
    assert not Path(config.output).exists()


# --- the Hub ---


class FakeHub:
    """Stands in for `HfApi`; what an upload really sends is tested in test_hub.py."""

    uploads: list[tuple[str, set[str]]] = []
    broken = False

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> huggingface_hub.RepoUrl:
        assert (private, exist_ok) == (True, True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.broken:
            raise OSError("no network")
        self.uploads.append((repo_id, {path.name for path in folder_path.iterdir()}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr("training.outputs.publish.HfApi", FakeHub)
    monkeypatch.setattr("training.outputs.publish.get_token", lambda: "hf_token")
    monkeypatch.setattr(FakeHub, "uploads", [])
    return FakeHub


def test_the_finished_pipeline_goes_to_the_hub_with_its_card(make_config, hub: type[FakeHub]) -> None:
    train(make_config(push_to_hub="tester/tiny", **{"schedule.steps": 1}))
    ((repository, names),) = hub.uploads
    assert repository == "tester/tiny"
    assert {"model_index.json", "README.md", "transformer", "vae"} <= names


def test_a_failed_push_loses_nothing_and_tells_what_to_do(make_config, hub: type[FakeHub], monkeypatch) -> None:
    monkeypatch.setattr(hub, "broken", True)
    config = make_config(push_to_hub="tester/tiny", **{"schedule.steps": 1})
    with pytest.raises(PublishError, match="hf upload tester/tiny .*run/pipeline"):
        train(config)
    assert (Path(config.output) / "pipeline" / "model_index.json").is_file()


def test_a_push_that_cannot_succeed_is_refused_at_the_start(make_config, monkeypatch) -> None:
    monkeypatch.setattr("training.outputs.publish.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        Trainer(make_config(push_to_hub="tester/tiny"))
    with pytest.raises(ConfigError, match="push_to_hub is 'a/b/c'"):
        check_repository("a/b/c")
