"""Which of how many processes this is."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """accelerate's view of this process and its companions.

    On CPUs several processes work together only if ACCELERATE_USE_CPU says so, which `Accelerator` reads and
    `PartialState` by itself does not: each would take itself for the only one, and do the whole work.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
