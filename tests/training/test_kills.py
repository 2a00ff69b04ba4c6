"""Runs that are killed, and checkpoints that break: lost are at most the steps since the last good checkpoint."""

import errno
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from test_train import final_tensors, losses, train

from training.checkpoints import CheckpointError, checkpoint_folders
from training.config import TrainConfig, load_config, to_dict
from training.train import Trainer


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()


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


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("num_kills", "steps", "workers"), [(7, 42, 0), (3, 18, 1)])
def test_ten_kills_at_random_moments_change_no_bit(make_config, num_kills: int, steps: int, workers: int) -> None:
    check_kills(make_config, num_kills, steps, workers)


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
    assert Path(trained.output, "checkpoints", "broken-step-00000004").is_dir()
    again.run()
    assert all(torch.equal(expected[name], value) for name, value in final_tensors(trained.output).items())


def test_half_a_progress_file_and_a_missing_one_are_broken_too(trained) -> None:
    truncate(newest(trained) / "progress.json")
    assert Trainer(trained).step == 2
    (newest(trained) / "progress.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):  # rather than a start from scratch
        Trainer(trained)
    assert newest(trained).name == "step-00000002"


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


# --- the same run on other machines ---


def test_the_global_batch_may_be_cut_otherwise_but_not_changed(trained, make_config) -> None:
    options = {"schedule.steps": 6, "checkpoints.every": 2, "data.batch_size": 2}
    with pytest.raises(CheckpointError, match="global batch .* was 4, now 2"):
        Trainer(make_config(**options))
    assert Trainer(make_config(**options, **{"optimizer.global_batch_size": 4})).step == 4
