"""Two processes that really communicate, each with the whole state or half of it: the same run, the same files."""

import errno
import gc
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from rounding import CURVE, assert_trained_alike
from safetensors.torch import load_file
from test_train import final_tensors, losses, train
from torch import nn

from training.distributed.engine import ReplicatedEngine, Step
from training.distributed.interruption import TrainingInterrupted
from training.distributed.zero2 import Zero2Engine
from training.outputs.checkpoints import checkpoint_folders
from training.settings.config import ConfigError, TrainConfig, load_config, to_dict
from training.trainer import Trainer


OPTIONS = {
    "model.dropout": 0.0,
    "model.patch_size": 2,
    "schedule.steps": 4,
    "optimizer.max_grad_norm": 0.05,  # reached, so that clipping shows
    "optimizer.gradient_accumulation": 2,
    "validation.fraction": 0.2,
    "preview.every": 4,
    "preview.labels": [0],
    "preview.rows": 1,
    "preview.num_inference_steps": 2,
}


def without_compiling() -> None:
    """On CPUs DeepSpeed compiles a faster way to communicate, for a minute; gloo does."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_rank(file: str, rank: int, port: int) -> None:
    """What torchrun would start: one of two processes on CPUs."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= addresses
    torch.set_num_threads(1)
    config = load_config([f"--config={file}"])
    if config.sharding == "zero2":
        without_compiling()
    with without_reducers_at_the_end(), suppress(TrainingInterrupted):
        Trainer(config).run()


@contextmanager
def without_reducers_at_the_end() -> Iterator[None]:
    """Fails if DDP is alive when the process group goes: the last reference to the group would go with its reducer,
    where PyTorch may wait forever.
    """
    destroy = dist.destroy_process_group

    def checked(*arguments: object) -> None:
        assert not [value for value in gc.get_objects() if type(value) is nn.parallel.DistributedDataParallel]
        destroy(*arguments)

    with mock.patch("torch.distributed.destroy_process_group", checked):
        yield
    assert not dist.is_initialized()


def run_rank_with_a_full_disk(file: str, rank: int, port: int) -> None:
    """`run_rank`, where the first save of the optimiser fails on the main process."""
    save, failures = torch.save, [OSError(errno.ENOSPC, "No space left on device")] * (rank == 0)

    def failing(value: object, path: object, *arguments: object, **options: object) -> None:
        if "optimizer" in str(path) and failures:
            raise failures.pop()
        save(value, path, *arguments, **options)

    torch.save = failing
    run_rank(file, rank, port)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_split(config: TrainConfig, target: Callable[[str, int, int], None] = run_rank) -> list[BaseProcess]:
    """The run in two new processes, each with a share of what is split."""
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train"])
    processes: list[BaseProcess] = [context.Process(target=target, args=(str(file), rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def run_split(config: TrainConfig, target: Callable[[str, int, int], None] = run_rank) -> None:
    """The run in two processes, to its end."""
    assert_end_well(start_split(config, target))


def assert_end_well(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def assert_close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Equal up to rounding, but for keys' biases: softmax cancels them, and AdamW enlarges what rounding leaves."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not name.endswith("to_k.bias"):
            assert_trained_alike(found[name], value, name)


def pipeline_tensors(output: str) -> dict[str, torch.Tensor]:
    files = Path(output, "pipeline").glob("*/diffusion_pytorch_model.safetensors")
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def weights_and_averages(output: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in final_tensors(output).items() if "exp_avg" not in name}


@pytest.mark.timeout(900)  # two short runs: seconds, but minutes where many share the processor
@pytest.mark.parametrize("sharding", ["no", "fsdp2", "zero2"])
def test_two_processes_make_the_run_of_one(make_config, sharding) -> None:
    if sharding == "zero2":
        pytest.importorskip("deepspeed")
    one = make_config("one", **OPTIONS)
    train(one)
    options = OPTIONS | {"data.batch_size": 2, "sharding": sharding, "gradient_checkpointing": True}
    two = make_config("two", **options)
    run_split(two)
    assert losses(two.output) == pytest.approx(losses(one.output), rel=CURVE)
    assert_close(pipeline_tensors(one.output), pipeline_tensors(two.output))
    states = weights_and_averages(one.output), weights_and_averages(two.output)
    assert_close(*states)
    validations = [Path(config.output, "validation.jsonl").read_text().splitlines() for config in (one, two)]
    assert len(validations[0]) == len(validations[1]) == 1
    assert (Path(two.output) / "previews/step-00000004.png").exists()

    # resumed: in two processes the same to the bit, and in one process what two have written
    again = make_config("again", **options)
    shutil.copytree(two.output, again.output)
    shutil.rmtree(checkpoint_folders(Path(again.output))[-1])
    run_split(again)
    expected, found = final_tensors(two.output), final_tensors(again.output)
    assert expected.keys() == final_tensors(one.output).keys()  # the optimiser's too
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.rmtree(checkpoint_folders(Path(again.output))[-1])

    # and in two processes what one has written
    handed = make_config("handed", **options)
    shutil.copytree(one.output, handed.output)
    shutil.rmtree(checkpoint_folders(Path(handed.output))[-1])
    run_split(handed)
    assert_close(states[0], weights_and_averages(handed.output))

    alone = Trainer(make_config("again", **OPTIONS))
    assert alone.step == 2
    alone.run()
    assert_close(states[0], weights_and_averages(again.output))


def test_what_does_not_go_with_sharding_is_refused(make_config) -> None:
    with pytest.raises(ConfigError, match="sharding=fsdp2 does not work with mixed_precision=fp16"):
        make_config(sharding="fsdp2", mixed_precision="fp16")
    assert type(Trainer(make_config(sharding="fsdp2")).engine) is ReplicatedEngine  # one process has nothing to share


def test_deepspeed_that_is_missing_is_named_before_anything_is_done(make_config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"sharding=zero2 needs DeepSpeed: pip install"):
        Trainer(make_config(sharding="zero2"))


@pytest.fixture
def zero_engine(make_config, monkeypatch) -> Iterator[tuple[Zero2Engine, nn.Linear]]:
    """DeepSpeed around a small layer, alone in a process group."""
    deepspeed = pytest.importorskip("deepspeed")
    without_compiling()
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    layer = nn.Linear(3, 1, bias=False)
    accelerator = mock.Mock(
        device=torch.device("cpu"), is_main_process=True, gradient_accumulation_steps=1, sync_gradients=True
    )
    try:
        yield Zero2Engine(layer, make_config(sharding="zero2"), accelerator), layer
    finally:
        deepspeed.comm.destroy_process_group()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zero_skips_a_bad_step_and_then_goes_on(zero_engine, bad) -> None:
    engine, layer = zero_engine
    engine.model.train()

    def step(added: float) -> Step:
        for last in (False, True):
            engine.accelerator.sync_gradients = last
            engine.backward(engine.model(input=torch.ones(2, 3)).sum() / 2 + added)
        return engine.step()

    start = layer.weight.clone()
    skipped = step(bad)
    assert not math.isfinite(skipped.grad_norm)  # the gradients alone would be finite
    assert not skipped.stepped
    assert torch.equal(layer.weight, start)
    assert not engine.whole_optimizer()["state"]
    assert step(0.0).grad_norm == pytest.approx(2 * 3**0.5)
    assert not torch.equal(layer.weight, start)
    assert engine.whole_optimizer()["state"][0]["step"] == 1


def test_a_save_that_fails_leaves_the_run_as_it_was(zero_engine, monkeypatch) -> None:
    engine, layer = zero_engine
    engine.set_learning_rate(0.0)
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0

    def step() -> None:
        engine.backward(engine.model(input=torch.ones(2, 3)).sum())
        engine.step()

    step()
    start = layer.weight.clone()
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", mock.Mock(side_effect=RuntimeError("full")))
    with pytest.raises(RuntimeError, match="full"):
        engine.whole_optimizer()
    step()
    assert torch.equal(layer.weight, start)


@pytest.mark.timeout(900)
def test_a_full_disk_on_one_process_costs_a_checkpoint_not_the_run(make_config) -> None:
    options = OPTIONS | {"preview.every": None, "data.batch_size": 2, "sharding": "fsdp2", "checkpoints.every": 2}
    config = make_config("two", **options)
    run_split(config, run_rank_with_a_full_disk)
    assert [path.name for path in checkpoint_folders(Path(config.output))] == ["step-00000004"]


@pytest.mark.timeout(900)
def test_one_process_asked_to_stop_stops_both_at_one_step(make_config) -> None:
    options = {"data.batch_size": 2, "schedule.steps": 100_000, "checkpoints.every": 100_000}
    config = make_config("two", **options)
    processes = start_split(config)
    while len(losses(config.output)) < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.05)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert_end_well(processes)
    (saved,) = checkpoint_folders(Path(config.output))
    assert saved.name == f"step-{len(losses(config.output)):08d}"
    assert len(list((saved / "state").glob("random_states_*.pkl"))) == 2
