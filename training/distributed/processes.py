"""How many processes work together, which of them this is, and how long they wait for each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)

from training.settings.config import ConfigError, TrainConfig


# torch's default, ten minutes, is too short: the other processes wait while the main one prepares a dataset or draws
# previews, or while one of them has more images to encode.
LONGEST_WAIT = timedelta(days=1)


def process_state() -> PartialState:
    """accelerate's view of this process and its companions.

    On CPUs several processes work together only if the variable ACCELERATE_USE_CPU is set. `Accelerator` reads it, and
    `PartialState` by itself does not: each process would take itself for the only one, and do the whole work.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


@contextmanager
def processes() -> Iterator[PartialState]:
    """`process_state()` for a whole command. The process group is taken down after it, unless it failed; NCCL warns of
    one that is still up when its process ends.
    """
    state = process_state()
    yield state
    state.destroy_process_group()


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The `Accelerator` of a run.

    Raises:
        ConfigError: for a launcher that splits the weights in its own way.
    """
    output = Path(config.output)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / "tensorboard")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # gradients and buckets share memory
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    check_distribution(accelerator.distributed_type)
    return accelerator


def check_distribution(distributed_type: DistributedType) -> None:
    """Refuse launchers that split the weights over processes in ways that checkpoints here do not know.

    Raises:
        ConfigError: for accelerate's FSDP, DeepSpeed and Megatron.
    """
    splitting = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if distributed_type in splitting:
        raise ConfigError(
            f"the launcher asks for {distributed_type.value}, which is not supported. Launch with --multi_gpu, and "
            "set sharding=fsdp2 to split weights, gradients, optimiser and EMA over the processes, or sharding=zero2 "
            "to let DeepSpeed split gradients and optimiser"
        )
