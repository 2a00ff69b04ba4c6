"""Whole runs on tiny models: resuming, kills, bad steps, inheritance, two processes."""

import copy
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.optimizer import patch_optimizer_step
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import launch
from rounding import CURVE
from safetensors.torch import load_file

from training.data.batches import more_workers_than_cores
from training.distributed.interruption import TrainingStopped
from training.distributed.processes import check_distribution
from training.model.ema import WeightAverage
from training.model.optimizer import build_optimizer, parameter_groups
from training.model.schedule import LearningRate
from training.outputs.checkpoints import CheckpointError, checkpoint_folders, find_checkpoints
from training.settings.config import ConfigError, ScheduleConfig, TrainConfig, to_dict
from training.train import main
from training.trainer import Trainer
from transdiff_pipelines import TransDiffPipeline, half_precision


def train(config: TrainConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def losses(output: str | Path) -> list[float]:
    """Of the lines that are complete; a run may be writing."""
    file = Path(output) / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["loss"] for line in text.splitlines() if line.endswith("}")]


def final_tensors(output: str) -> dict[str, torch.Tensor]:
    """Raw weights, averaged weights and optimiser moments of the last checkpoint."""
    state = checkpoint_folders(Path(output))[-1] / "state"
    optimizer = torch.load(state / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{key}.{name}": value for key, row in optimizer.items() for name, value in row.items()}
    ema = {f"ema.{name}": value for name, value in load_file(state / "ema.safetensors").items()}
    return load_file(state / "model.safetensors") | ema | moments


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_resumed_run_is_bit_identical_to_one_that_went_through(make_config, patch_size: int) -> None:
    options = {
        "model.patch_size": patch_size,
        "model.dropout": 0.3,
        "schedule.steps": 5,
        "schedule.decay": "cosine",
        "checkpoints.keep": 3,
        "optimizer.gradient_accumulation": 2,
    }
    whole, killed = make_config("whole", **options), make_config("killed", **options)
    train(whole)
    shutil.copytree(whole.output, killed.output)  # as after a kill between steps 4 and 5, with step 2 as the last save
    for path in (*checkpoint_folders(Path(killed.output))[1:], Path(killed.output) / "pipeline"):
        shutil.rmtree(path)
    resumed = Trainer(killed)
    assert resumed.step == 2
    resumed.run()
    assert losses(killed.output) == losses(whole.output)
    expected, found = final_tensors(whole.output), final_tensors(killed.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_finished_pipeline_holds_averaged_weights_and_what_the_run_recommends(make_config) -> None:
    config = make_config(**{"sampling.guidance_scale": 1.7, "sampling.drift_scale": 0.9, "schedule.steps": 6})
    trainer = train(config)
    pipeline = TransDiffPipeline.from_pretrained(Path(config.output) / "pipeline")
    averaged = load_file(checkpoint_folders(Path(config.output))[-1] / "state" / "ema.safetensors")
    raw = dict(trainer.module.named_parameters())
    name = "transformer.proj_out.weight"
    assert torch.equal(pipeline.transformer.proj_out.weight, averaged[name])
    assert not torch.equal(averaged[name], raw[name])
    assert (pipeline.config.guidance_scale, pipeline.scheduler.config.drift_scale) == (1.7, 0.9)
    assert pipeline.get_label_ids(["10"]) == [2]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["10", "2"], num_inference_steps=2).images[0].size == (16, 16)


def test_mrar_starts_from_a_one_step_pipeline(make_config, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_config("first", **{"schedule.steps": 1, "model.decoder_patch_size": 2})
    one_step = train(first)
    sizes = dict.fromkeys(one_step.config.model.sizes())
    settings = {f"model.{name}": None for name in sizes} | {"model.patch_size": 2}
    second = make_config("second", **settings, **{"model.start_from": f"{first.output}/pipeline"})
    trainer = Trainer(second)
    assert trainer.module.condition_encoder.num_images == 4
    assert trainer.module.transformer.config.patch_size == 2
    old = TransDiffPipeline.from_pretrained(f"{first.output}/pipeline").transformer.state_dict()
    assert all(torch.equal(old[name], value) for name, value in trainer.module.transformer.state_dict().items())
    output = capsys.readouterr().out
    assert "resized  mask_token" in output
    assert "frozen: condition_encoder.reference_projection" in output  # said by the 1-step run
    trainer.run()
    assert all("loss_image_3" in line for line in (Path(second.output) / "metrics.jsonl").read_text().splitlines())
    with pytest.raises(ConfigError, match="encoder_layers 7"):
        Trainer(
            make_config(
                "third", **settings | {"model.encoder_layers": 7, "model.start_from": f"{first.output}/pipeline"}
            )
        )


@pytest.mark.parametrize("side", [0, 3])
def test_a_token_of_the_decoder_divides_the_latents(make_config, side: int) -> None:
    with pytest.raises(ConfigError, match=f"model.decoder_patch_size is {side}, and the latents have a side of"):
        Trainer(make_config("run", **{"model.decoder_patch_size": side}))


def test_frozen_networks_stay_as_they_were(make_config) -> None:
    config = make_config(**{"model.frozen": ["condition_encoder"], "schedule.steps": 2})
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    trainer.run()
    changed = {
        name.split(".")[0] for name, value in trainer.module.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"transformer"}


def test_weight_decay_spares_vectors_and_the_decoder(make_config) -> None:
    module = Trainer(make_config()).module
    decayed, plain = parameter_groups(module, 0.02)
    names = {id(value): name for name, value in module.named_parameters()}
    decayed_names = {names[id(value)] for value in decayed["params"]}
    assert all(name.startswith("condition_encoder.") for name in decayed_names)
    assert all(value.ndim > 1 for value in decayed["params"])
    assert {"condition_encoder.class_embedding.weight", "condition_encoder.mask_token"} < decayed_names
    trained = sum(value.requires_grad for value in module.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trained
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.02, 0.0)


def test_the_learning_rate_warms_up_then_stays_or_falls() -> None:
    constant = LearningRate(2.0, ScheduleConfig(epochs=4, warmup_epochs=1), steps_per_epoch=10)
    assert (constant.total_steps, constant.warmup_steps) == (40, 10)
    assert [constant.at(step) for step in (0, 4, 9, 10, 39)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    cosine = LearningRate(2.0, ScheduleConfig(steps=20, decay="cosine"), steps_per_epoch=10)
    assert [cosine.at(step) for step in (0, 10, 20)] == pytest.approx([2.0, 1.0, 0.0])


def test_training_learns(make_config) -> None:
    config = make_config(**{"schedule.steps": 60, "data.batch_size": 8, "checkpoints.every": 60, "log_every": 10})
    train(config)
    curve = losses(config.output)
    assert curve[-1] < 0.9 * curve[0]


def test_accumulated_batches_give_the_curve_of_one_large_batch(make_config) -> None:
    options = {"model.dropout": 0.0, "checkpoints.every": 100}
    train(make_config("large", **options))
    small = make_config("small", **options, **{"data.batch_size": 2, "optimizer.gradient_accumulation": 2})
    train(small)
    assert losses(small.output) == pytest.approx(losses(make_config("large").output), rel=CURVE)


def test_bf16_keeps_weights_in_float32_and_stays_near_float32(make_config, monkeypatch, capsys) -> None:
    monkeypatch.setattr(half_precision, "slowdown", lambda dtype: 30.0)
    options = {"model.dropout": 0.0, "checkpoints.every": 100}
    train(make_config("full", **options))
    AcceleratorState._reset_state()  # one precision per process otherwise
    half = make_config("half", **options, mixed_precision="bf16")
    trainer = train(half)
    assert capsys.readouterr().out.count("warning: bfloat16 is slow on this processor") == 1
    assert {value.dtype for value in trainer.module.parameters()} == {torch.float32}
    assert losses(half.output) == pytest.approx(losses(make_config("full").output), rel=0.05)
    assert losses(half.output) != losses(make_config("full").output)


def test_more_workers_than_cores_are_told_of_in_one_line(make_config, monkeypatch, capsys, recwarn) -> None:
    """In this package's words alone, though torch notices it too; and the losses are the same."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    options = {"schedule.steps": 2, "checkpoints.every": 100}
    train(make_config("none", **options, **{"data.workers": 0}))
    assert "data.workers" not in capsys.readouterr().out
    train(make_config("three", **options, **{"data.workers": 3}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "workers is" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: data.workers is 3, and this machine has 2 processor core(s)")
    assert lines[0].endswith("--data.workers=2")
    assert [str(warning.message) for warning in recwarn if "worker" in str(warning.message)] == []
    assert losses(make_config("three").output) == losses(make_config("none").output)


@pytest.mark.parametrize(
    ("workers", "processes", "expected"), [(2, 1, None), (1, 2, None), (2, 2, "=1"), (1, 3, "=0")]
)
def test_workers_of_several_processes_share_the_cores(monkeypatch, workers, processes, expected) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    found = more_workers_than_cores(workers)
    if expected is None:
        assert found is None
    else:
        assert f"for each of {processes} processes" in found
        assert found.endswith(f"--data.workers{expected}")


# --- memory and speed ---


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"optimizer.kind": "adamw"}])
def test_memory_and_speed_options_leave_the_curve_alone(make_config, change: dict) -> None:
    options = {"model.patch_size": 2, "checkpoints.every": 100}  # dropout is on: its draws are repeated
    train(make_config("plain", **options))
    train(make_config("other", **options, **change))
    assert losses(make_config("other").output) == pytest.approx(losses(make_config("plain").output), rel=CURVE)


def test_compiled_blocks_leave_the_curve_alone_and_the_checkpoint_too(make_config) -> None:
    options = {"checkpoints.every": 100, "model.dropout": 0.0, "schedule.steps": 2}
    train(make_config("plain", **options))
    train(make_config("compiled", **options, compile="aot_eager"))
    assert losses(make_config("compiled").output) == pytest.approx(losses(make_config("plain").output), rel=CURVE)
    assert final_tensors(make_config("compiled").output).keys() == final_tensors(make_config("plain").output).keys()


def test_muon_and_adamw_are_pytorch_s_own(make_config) -> None:
    """Stepped as one, after loading too, they do what each does by itself."""
    trainer = Trainer(make_config(**{"optimizer.kind": "muon"}))
    module, settings = trainer.module, trainer.config.optimizer
    apart = copy.deepcopy(module)
    matrices, others = [], []
    for name, value in apart.named_parameters():
        if value.requires_grad:
            (matrices if ".transformer_blocks." in name and value.ndim == 2 else others).append((name, value))
    assert matrices
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)

    def groups(named):  # the decoder's weights do not decay
        decayed = [value for name, value in named if value.ndim > 1 and name.startswith("condition_encoder.")]
        plain = [value for name, value in named if not (value.ndim > 1 and name.startswith("condition_encoder."))]
        return [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]

    muon = torch.optim.Muon(groups(matrices), lr=rate, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups(others), lr=rate, betas=betas)
    whole = build_optimizer(module, settings)
    start = copy.deepcopy(apart.state_dict())
    for step in range(3):
        if step == 2:
            state = copy.deepcopy(whole.state_dict())
            whole = build_optimizer(module, settings)
            whole.load_state_dict(state)
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(module.parameters(), apart.parameters(), strict=True):
            if one.requires_grad:
                one.grad = other.grad = torch.randn(one.shape, generator=generator)
        for optimizer in (whole, muon, adamw):
            optimizer.step()
    for name, value in apart.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert not any(torch.equal(value, start[name]) for name, value in (*matrices, *others))


def test_muon_says_which_pytorch_has_it(make_config, monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs PyTorch 2\.9 or later"):
        Trainer(make_config(**{"optimizer.kind": "muon"}))


def test_8_bit_adamw_is_built_or_says_what_to_install(make_config) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="pip install bitsandbytes"):
            Trainer(make_config(**{"optimizer.kind": "8bit"}))
    else:
        assert (
            type(Trainer(make_config(**{"optimizer.kind": "8bit"})).engine.optimizer.optimizer).__name__ == "AdamW8bit"
        )


def test_launchers_that_split_the_weights_are_refused_before_anything_is_lost() -> None:
    for good in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        check_distribution(good)
    with pytest.raises(ConfigError, match="FSDP, which is not supported.*--multi_gpu.*sharding=fsdp2"):
        check_distribution(DistributedType.FSDP)


# --- resuming and kills ---


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(make_config, monkeypatch) -> None:
    config = make_config(**{"schedule.steps": 4})
    trainer = Trainer(config)
    save_weights = trainer._save_weights

    def die_late(folder: Path) -> None:
        save_weights(folder)
        if trainer.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_weights", die_late)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [path.name for path in checkpoint_folders(Path(config.output))] == ["step-00000002"]
    again = Trainer(config)
    assert again.step == 2
    again.run()
    assert [path.name for path in checkpoint_folders(Path(config.output))] == ["step-00000002", "step-00000004"]
    leftovers = list(Path(config.output).rglob("*partial*"))
    assert leftovers == []


def test_the_last_k_checkpoints_are_kept(make_config) -> None:
    config = make_config(**{"schedule.steps": 5, "checkpoints.every": 1, "checkpoints.keep": 2})
    train(config)
    assert [path.name for path in checkpoint_folders(Path(config.output))] == ["step-00000004", "step-00000005"]


def test_the_files_of_a_run_have_the_rights_of_any_other_file(make_config, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    config = make_config()
    train(config)
    saved = [path for path in Path(config.output).rglob("*") if path.is_file()]
    assert {"model.safetensors", "ema.safetensors", "random_states_0.pkl"} <= {path.name for path in saved}
    shards = list(Path(config.data.cache).glob("*.safetensors"))
    assert shards
    usual = (tmp_path / "plain").stat().st_mode
    assert [path for path in saved + shards if path.stat().st_mode != usual] == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_ends_no_run(make_config, tmp_path: Path, monkeypatch, stream: str) -> None:
    """As in `python -m training.train ... | head -1`; here the reader is gone before the first line."""
    config = make_config()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as nobody_reads:
        monkeypatch.setattr(sys, stream, nobody_reads)
        monkeypatch.setattr(sys, "argv", ["training.train", f"--config={file}"])
        main()
        assert getattr(sys, stream) is nobody_reads
    assert (Path(config.output) / "pipeline" / "model_index.json").is_file()


def test_what_resume_means(make_config, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    assert find_checkpoints(empty, "auto") == []
    assert find_checkpoints(empty, "never") == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoints(empty, "latest")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_checkpoints(empty, str(tmp_path / "step-00000007"))
    config = make_config(**{"schedule.steps": 4})
    train(config)
    older, newer = checkpoint_folders(Path(config.output))
    assert find_checkpoints(Path(config.output), "auto") == [newer, older]
    assert find_checkpoints(Path(config.output), "latest") == [newer, older]
    assert find_checkpoints(Path(config.output), str(older)) == [older]
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        find_checkpoints(Path(config.output), "never")


def test_a_run_does_not_continue_with_other_settings_but_may_be_prolonged(make_config) -> None:
    train(make_config(**{"schedule.steps": 2}))
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate was 0.01, now 0.5"):
        Trainer(make_config(**{"schedule.steps": 2, "optimizer.learning_rate": 0.5}))
    assert Trainer(make_config(**{"schedule.steps": 9})).rate.total_steps == 9


# --- bad steps ---


def spoil(trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the latents of the batches of these steps infinite."""
    draw = type(trainer.batches).__getitem__

    def spoiled(self, index: int) -> dict[str, torch.Tensor]:
        batch = draw(self, index)
        return batch | {"latents": batch["latents"] * (float("inf") if index in steps else 1)}

    monkeypatch.setattr(type(trainer.batches), "__getitem__", spoiled)


def test_a_bad_step_changes_nothing_but_the_count(make_config, monkeypatch) -> None:
    config = make_config(**{"schedule.steps": 4, "checkpoints.every": 1, "checkpoints.keep": 9})
    trainer = Trainer(config)
    spoil(trainer, {2}, monkeypatch)
    trainer.run()
    folders = checkpoint_folders(Path(config.output))
    weights = [load_file(folder / "state" / "model.safetensors")["transformer.proj_in.weight"] for folder in folders]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert weights[3].isfinite().all()
    assert json.loads((folders[-1] / "progress.json").read_text())["skipped"] == 1


def test_an_overflow_under_fp16_changes_neither_weights_nor_averages(make_config) -> None:
    """accelerate's scaler is put in by hand, as a CPU has none. PyTorch's fused AdamW skips the step by itself."""
    trainer = Trainer(make_config())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = trainer.engine.optimizer
    trainer.accelerator.scaler = optimizer.scaler = scaler
    optimizer._optimizer_original_step_method = optimizer.optimizer.step
    optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)
    backward, factors = trainer.engine.backward, iter([1.0, 1e38 * 1e38, 1.0])
    trainer.engine.backward = lambda loss: backward(loss * next(factors))
    states = []
    for index in range(3):
        trainer.train_step([trainer.batches[index]])
        states.append([value.clone() for value in (*trainer.module.parameters(), *trainer.ema.average.shadow_params)])
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before, after) for before, after in zip(*states[:2], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(*states[1:], strict=True))
    assert (trainer.ema.average.optimization_step, trainer.skipped) == (2, 0)


@pytest.mark.parametrize(("warmup", "decays"), [(True, [2 / 11, 3 / 12]), (False, [0.9, 0.9])])
def test_the_decay_of_the_average_rises_or_is_there_from_the_start(warmup: bool, decays: list[float]) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(module, decay=0.9, warmup=warmup), module.weight.item()
    for step, decay in enumerate(decays):
        module.weight.data.fill_(step)
        average.update()
        expected = decay * expected + (1 - decay) * step
        assert average.average.shadow_params[0].item() == pytest.approx(expected)


def test_several_bad_steps_in_a_row_stop_the_run_with_a_checkpoint(make_config, monkeypatch) -> None:
    config = make_config(**{"schedule.steps": 9, "checkpoints.every": 100, "optimizer.max_bad_steps": 2})
    trainer = Trainer(config)
    spoil(trainer, {1, 3, 4, 5}, monkeypatch)
    with pytest.raises(TrainingStopped, match="2 steps in a row"):
        trainer.run()
    (saved,) = checkpoint_folders(Path(config.output))
    assert saved.name == "step-00000005"


# --- reports ---


def test_previews_are_made_from_the_same_noise_and_leave_training_alone(make_config) -> None:
    preview = {"every": 2, "labels": [0, 2], "rows": 1, "num_inference_steps": 2}
    quiet, shown = make_config("quiet"), make_config("shown", preview=preview)
    train(quiet)
    train(shown)
    assert losses(quiet.output) == losses(shown.output)
    names = {path.name for path in (Path(shown.output) / "previews").iterdir()}
    assert names == {f"step-0000000{step}{weights}.png" for step in (2, 4) for weights in ("", "-raw")}
    assert (Path(shown.output) / "loss.png").exists()


def test_preview_labels_outside_the_classes_are_an_error(make_config) -> None:
    with pytest.raises(ConfigError, match=r"preview.labels \[3\] are outside 0..2"):
        Trainer(make_config(**{"preview.every": 2, "preview.labels": [0, 3]}))


@pytest.mark.timeout(900)
def test_two_processes_give_the_curve_of_one(make_config, tmp_path: Path) -> None:
    """The same global batch, split over two processes that really communicate."""
    options = {"model.dropout": 0.0, "model.patch_size": 2, "schedule.steps": 3}
    train(make_config("one", **options))
    two = make_config("two", **options, **{"data.batch_size": 2})
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(to_dict(two)), encoding="utf-8")
    launch("training.train", f"--config={file}")
    assert losses(two.output) == pytest.approx(losses(tmp_path / "one"), rel=CURVE)
    # what two processes saved, one continues at the same global batch
    alone = make_config("two", **options | {"schedule.steps": 4}, **{"data.batch_size": 4})
    assert Trainer(alone).step == 3
