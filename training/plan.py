"""What a run will need: `python -m training.plan --config FILE [--key=value ...]`.

Speed and memory are measured on the device at hand with a few steps for each batch size; rows for more processes are
computed from them and say so. Nothing is kept: the steps run in a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.command_line import one_line_errors, positive
from training.data.batches import GroupBatches
from training.distributed.zero2 import BUCKET
from training.outputs.metrics import PeakMemory
from training.settings.config import ConfigError, TrainConfig, config_or_exit

from .dry_run import state_bytes, state_per_process
from .trainer import Trainer


STEPS = 3
KINDS = ("no", "zero2", "fsdp2")
HEADER = "| processes | sharding | batch per process | images a second | GiB per process | schedule, hours | |"


@dataclass
class Measured:
    """What was measured of a batch size on this machine.

    `working` is the number of bytes that a step needs besides weights, optimiser and EMA: gradients, activations and
    buffers.
    """

    batch_size: int
    images_per_second: float
    working: int


@dataclass
class Plan:
    """What is known about a run.

    Attributes:
        state: bytes of the whole state, by use.
        blocks: bytes of the two largest blocks.
        images: how many images the run draws.
    """

    state: dict[str, int]
    blocks: int
    images: int

    def row(self, measured: Measured, processes: int, sharding: str) -> str:
        """A line of the table. Only what one process does without sharding was measured; the rest is extrapolated."""
        speed = measured.images_per_second * processes
        size = self.memory(measured, processes, sharding)
        cells = [
            processes, sharding, measured.batch_size, f"{speed:.3g}", f"{size / 2**30:.3g}",
            f"{self.images / speed / 3600:.3g}", "measured" if processes == 1 else "extrapolated",
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"

    def memory(self, measured: Measured, processes: int, sharding: str) -> int:
        """Bytes per process.

        DDP exchanges gradients in place. FSDP2 gathers the next block while one runs, so two blocks are whole at a
        time. DeepSpeed collects gradients in a bucket, whose size does not depend on the model, and copies it.
        """
        gradients = self.state["gradients"]
        beside_state = measured.working - gradients
        if processes == 1:
            return sum(self.state.values()) + beside_state
        exchanged = {"no": 0, "fsdp2": self.blocks, "zero2": 4 * BUCKET + min(4 * BUCKET, gradients)}[sharding]
        return sum(state_per_process(self.state, sharding, processes).values()) + beside_state + exchanged


def block_bytes(module: nn.Module) -> int:
    """Bytes of the two largest blocks in float32."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part if hasattr(block, "ff")]
    sizes = sorted(4 * sum(value.numel() for value in block.parameters()) for block in blocks)
    return sum(sizes[-2:])


def measure(trainer: Trainer, batch_size: int, steps: int) -> Measured | None:
    """Time and memory of whole training steps of one batch, after a first one that is not counted. None means that the
    device's memory does not suffice.
    """
    batches = GroupBatches.of(trainer.config, trainer.data, batch_size=batch_size)
    try:
        trainer.train_step([batches[0]])
        start = trainer.watch.now()
        for index in range(1, steps + 1):
            trainer.train_step([batches[index]])
        seconds = trainer.watch.now() - start
        with PeakMemory(trainer.accelerator.device) as peak:
            trainer.train_step([batches[steps + 1]])
    except torch.OutOfMemoryError:
        trainer.engine.optimizer.zero_grad()
        return None
    return Measured(batch_size, steps * batch_size * batches.group_size / seconds, peak.bytes)


def plan(config: TrainConfig, batch_sizes: Sequence[int], processes: Sequence[int], steps: int = STEPS) -> str:
    """The table for a configuration, in Markdown.

    Raises:
        ConfigError: if several processes were launched.
    """
    with tempfile.TemporaryDirectory(prefix="training-plan-") as folder:
        settings: dict[str, Any] = {
            "output": folder,
            "resume": "never",
            "trackers": [],
            "push_to_hub": None,
            "sharding": "no",
        }
        trainer = Trainer(dataclasses.replace(config, **settings))
    if trainer.accelerator.num_processes > 1:
        raise ConfigError("training.plan measures one process: start it with python, without a launcher")
    images = trainer.rate.total_steps * trainer.groups_per_step * trainer.batches.group_size
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.engine.model.train()
    known = Plan(state_bytes(trainer), block_bytes(trainer.module), images)
    lines = [HEADER, "|---" * 7 + "|"]
    for batch_size in batch_sizes:
        measured = measure(trainer, batch_size, steps)
        if measured is None:
            lines.append(f"| 1 | no | {batch_size} | | out of memory | | measured |")
            continue
        lines.append(known.row(measured, 1, "no"))
        lines += [known.row(measured, count, kind) for count in processes for kind in KINDS if count > 1]
    device = trainer.accelerator.device
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} thread(s)"
    return "\n".join([
        *lines,
        "",
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. Measured over {steps} steps, data and "
        "optimiser included, previews and checkpoints not. Extrapolated: speed in proportion to the processes, an "
        "upper bound; memory by formula.",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", help="groups per process; by default three, around data.batch_size"
    )
    parser.add_argument("--processes", type=positive, nargs="+", default=[2, 8, 64], help="rows to extrapolate to")
    options, rest = parser.parse_known_args(arguments)
    with one_line_errors("training.plan"):
        config = config_or_exit("training.plan", rest)
        size = config.data.batch_size
        print(plan(config, options.batch_sizes or sorted({max(1, size // 2), size, 2 * size}), options.processes))


if __name__ == "__main__":
    main()
