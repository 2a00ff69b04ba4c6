"""Runs that are killed, and checkpoints that break: lost are at most the steps since the last good checkpoint."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from rounding import CURVE, assert_trained_alike
from safetensors.torch import load_file
from test_train import final_tensors, losses, train

from training.outputs.checkpoints import CheckpointError, checkpoint_folders
from training.settings.config import TrainConfig, load_config, to_dict
from training.train import main
from training.trainer import Trainer


# --- SIGKILL ---


def run_file(file: str) -> None:
    """What a process of its own does: the command line, without its imports' time."""
    torch.set_num_threads(1)
    Trainer(load_config([f"--config={file}"])).run()


def start(config: TrainConfig) -> BaseProcess:
    """The run in a new process, forked from a server that has the imports behind it and never computed anything."""
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train"])
    process = context.Process(target=run_file, args=(str(file),))
    process.start()
    return process


def finish(config: TrainConfig) -> None:
    process = start(config)
    process.join()
    assert process.exitcode == 0


def kill_when(config: TrainConfig, reached: Callable[[], bool], delay: float) -> bool:
    """Start the run (again), and end it with SIGKILL `delay` seconds after `reached()`; whether it still ran then."""
    process = start(config)
    while process.is_alive() and not reached():
        time.sleep(0.005)
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def names(config: TrainConfig) -> list[str]:
    """What lies in the run's checkpoint folder."""
    return sorted(path.name for path in Path(config.output, "checkpoints").iterdir())


def logged_steps(config: TrainConfig) -> int:
    file = Path(config.output) / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def check_kills(make_config, num_kills: int, steps: int, workers: int) -> None:
    options = {
        "data.workers": workers,
        "model.patch_size": 2,
        "model.dropout": 0.2,
        "schedule.steps": steps,
        "schedule.decay": "cosine",
        "checkpoints.every": 3,
    }
    whole, killed = make_config("whole", **options), make_config("killed", **options)
    finish(whole)
    moments = random.Random(num_kills)
    hits = 0
    for step in sorted(moments.sample(range(steps - 3), num_kills)):
        hits += kill_when(killed, lambda step=step: logged_steps(killed) >= step, moments.uniform(0, 0.1))
    assert hits > num_kills / 2  # a busy machine may miss the end of a run
    finish(killed)
    expected, found = final_tensors(whole.output), final_tensors(killed.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(killed.output) == losses(whole.output)


@pytest.mark.timeout(1200)  # six short runs: seconds, but minutes where many share the processor
def test_three_kills_at_random_moments_change_no_bit(make_config) -> None:
    check_kills(make_config, 3, 14, workers=0)


@pytest.mark.timeout(1200)
def test_a_kill_with_a_process_that_prepares_batches_changes_no_bit(make_config) -> None:
    check_kills(make_config, 1, 8, workers=1)


@pytest.mark.timeout(900)
def test_nothing_is_left_of_a_run_that_was_killed(make_config) -> None:
    options = {"data.workers": 2, "schedule.steps": 100_000, "checkpoints.every": 100_000}
    config = make_config(**options)
    process = start(config)
    while logged_steps(config) < 2:
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.kill()
    assert psutil.wait_procs(started, timeout=120)[1] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("num_kills", "steps", "workers"), [(7, 42, 0), (3, 18, 1)])
def test_ten_kills_at_random_moments_change_no_bit(make_config, num_kills: int, steps: int, workers: int) -> None:
    check_kills(make_config, num_kills, steps, workers)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_run_that_is_asked_to_stop_saves_first(make_config, number: signal.Signals, workers: int) -> None:
    """As in a terminal Ctrl-C reaches all of its processes, the workers first."""
    options = {"schedule.steps": 100_000, "checkpoints.every": 100_000, "log_every": 1}
    config = make_config(**options, **{"data.workers": workers})
    process = start(config)
    while logged_steps(config) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(number)
    time.sleep(0.2)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1  # TrainingInterrupted, which main turns into 130
    (saved,) = checkpoint_folders(Path(config.output))
    lines = len(losses(config.output))
    assert saved.name == f"step-{lines:08d}"
    assert Trainer(config).step == lines


def test_main_tells_where_the_work_of_an_interrupted_run_is(make_config, monkeypatch, capsys) -> None:
    config = make_config(**{"schedule.steps": 9, "checkpoints.every": 2})
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    step = Trainer.train_step

    def interrupted(self: Trainer, batches: list) -> tuple:
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    monkeypatch.setattr(sys, "argv", ["training.train", f"--config={file}"])
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores Ctrl-C, and so do its children
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "interrupted; step 5 is saved in" in capsys.readouterr().err
    assert names(config)[-1] == "step-00000005"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_kill_while_a_checkpoint_is_written(make_config) -> None:
    config = make_config(**{"schedule.steps": 6, "checkpoints.every": 3})
    kill_when(config, lambda: any(Path(config.output).glob("checkpoints/.step-00000003.partial/state/*")), 0)
    finish(config)
    assert names(config) == ["step-00000003", "step-00000006"]


# --- checkpoints that break ---


@pytest.fixture
def trained(make_config) -> TrainConfig:
    config = make_config(**{"schedule.steps": 4, "checkpoints.every": 2})
    train(config)
    return config


def newest(config: TrainConfig) -> Path:
    return checkpoint_folders(Path(config.output))[-1]


def truncate(path: Path) -> None:
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()  # who has it mapped keeps the whole
    path.write_bytes(half)


@pytest.mark.parametrize("file", ["state/model.safetensors", "state/ema.safetensors", "state/optimizer.bin"])
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(trained, file: str, capsys) -> None:
    expected = final_tensors(trained.output)
    truncate(newest(trained) / file)
    again = Trainer(trained)
    assert again.step == 2
    assert "step-00000004 cannot be read" in capsys.readouterr().out
    again.run()
    assert Path(trained.output, "checkpoints", "broken-step-00000004").is_dir()
    assert all(torch.equal(expected[name], value) for name, value in final_tensors(trained.output).items())


def test_half_a_progress_file_and_a_missing_one_are_broken_too(trained) -> None:
    truncate(newest(trained) / "progress.json")
    assert Trainer(trained).step == 2
    for folder in checkpoint_folders(Path(trained.output)):
        (folder / "progress.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):  # rather than a start from scratch
        Trainer(trained)
    assert names(trained) == ["step-00000002", "step-00000004"]


def test_a_full_disk_costs_a_checkpoint_not_the_run(make_config, monkeypatch, capsys) -> None:
    config = make_config(**{"schedule.steps": 6, "checkpoints.every": 2, "checkpoints.keep": 9})
    trainer = Trainer(config)
    save_weights, full = trainer._save_weights, {4}

    def fill(folder: Path) -> None:
        save_weights(folder)
        if trainer.step in full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_save_weights", fill)
    trainer.run()
    assert names(config) == ["step-00000002", "step-00000006"]
    assert "No space left on device" in capsys.readouterr().out
    trainer.step, full = 6, {6}
    shutil.rmtree(newest(config))
    with pytest.raises(CheckpointError, match="No space left"):  # the last checkpoint is the result
        trainer._save_when_due()
    assert newest(config).name == "step-00000002"


def test_reports_that_cannot_be_written_cost_no_step(make_config, monkeypatch, capsys) -> None:
    preview = {"every": 2, "labels": [0], "rows": 1, "num_inference_steps": 1}
    config = make_config(
        **{"schedule.steps": 4, "preview": preview, "validation.fraction": 0.3, "validation.every": 2}
    )
    trainer = Trainer(config)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.outputs.metrics.MetricsLog.write", full)
    monkeypatch.setattr("training.outputs.reports.save_preview", full)
    trainer.run()
    output = capsys.readouterr().out
    for name in ("metrics.jsonl", "validation.jsonl", "step-00000002.png"):
        assert f"{name} cannot be written ([Errno 28] No space left on device)" in output
    assert names(config) == ["step-00000002", "step-00000004"]


def test_a_file_in_the_place_of_the_checkpoints_is_a_warning_until_the_end(make_config, capsys) -> None:
    config = make_config(**{"schedule.steps": 2, "checkpoints.every": 1})
    Path(config.output).mkdir()
    Path(config.output, "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="step-00000002 cannot be written"):
        train(config)
    assert "step-00000001 cannot be written" in capsys.readouterr().out


def test_leftovers_of_a_killed_save_are_removed(trained) -> None:
    leftover = Path(trained.output) / "checkpoints" / ".step-00000003.partial" / "state"
    leftover.mkdir(parents=True)
    train(trained)
    assert names(trained) == ["step-00000002", "step-00000004"]


# --- going on from where one wants ---


def test_checkpoints_after_the_one_chosen_are_set_aside(trained, make_config, capsys) -> None:
    older = checkpoint_folders(Path(trained.output))[0]
    options = {"schedule.steps": 3, "checkpoints.every": 2, "checkpoints.keep": 1, "resume": str(older)}
    train(make_config(**options))
    assert names(trained) == ["abandoned-step-00000004", "step-00000003"]
    assert (
        "step-00000004 is now called abandoned-step-00000004: the run goes on from step 2" in capsys.readouterr().out
    )
    assert Trainer(make_config(**options | {"resume": "auto"})).step == 3


def test_a_dry_run_renames_nothing(trained, monkeypatch, capsys) -> None:
    truncate(newest(trained) / "state" / "ema.safetensors")
    file = Path(trained.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(trained)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["training.train", f"--config={file}", "--dry-run"])
    main()
    assert "nothing is trained or written" in capsys.readouterr().out
    assert names(trained) == ["step-00000002", "step-00000004"]


def test_another_vae_or_base_in_the_same_place_does_not_continue_a_run(make_config, data_config, tmp_path) -> None:
    vae = Path(shutil.copytree(data_config.vae, tmp_path / "vae"))
    options = {"schedule.steps": 2, "data.cache": None, "data.images": data_config.images, "data.vae": str(vae)}
    base = make_config("base", **options)
    train(base)
    sizes = {f"model.{name}": None for name in base.model.sizes()}
    adapted = make_config(
        "lora", **options, **sizes, **{"lora.rank": 2, "model.start_from": f"{base.output}/pipeline"}
    )
    train(adapted)
    train(make_config("base", **options | {"schedule.steps": 3}))
    with pytest.raises(CheckpointError, match="the weights of model.start_from were others"):
        Trainer(adapted)
    torch.manual_seed(1)
    other = AutoencoderKL.from_pretrained(vae)
    other.encoder.conv_in.weight.data.add_(0.1)
    other.save_pretrained(vae)
    with pytest.raises(CheckpointError, match="the VAE's weights were others"):
        Trainer(base)


# --- the same run on other machines ---


@pytest.mark.parametrize("steps_before", [2, 3])
def test_a_run_cut_into_other_batches_goes_on_as_if_it_had_not_been(make_config, steps_before: int) -> None:
    """Whatever the number of batches before: a step is a step of the optimiser."""
    options = {"model.dropout": 0.0, "checkpoints.every": 1}
    train(make_config("whole", **options | {"schedule.steps": 5}))
    train(make_config("cut", **options | {"schedule.steps": steps_before}))
    smaller = {"schedule.steps": 5, "data.batch_size": 2, "optimizer.global_batch_size": 4}
    train(make_config("cut", **options | smaller))
    expected, found = (
        load_file(newest(make_config(name)) / "state" / "model.safetensors") for name in ("whole", "cut")
    )
    for name, value in expected.items():
        if not name.endswith("to_k.bias"):  # softmax cancels it, and AdamW enlarges what rounding leaves
            assert_trained_alike(found[name], value, name)
    assert losses(make_config("cut").output) == pytest.approx(losses(make_config("whole").output), rel=CURVE)


def test_the_global_batch_may_be_cut_otherwise_but_not_changed(trained, make_config) -> None:
    options = {"schedule.steps": 6, "checkpoints.every": 2, "data.batch_size": 2}
    with pytest.raises(CheckpointError, match="global batch .* was 4, now 2"):
        Trainer(make_config(**options))
    assert Trainer(make_config(**options, **{"optimizer.global_batch_size": 4})).step == 4
