"""All parts in order of worth: what a short run leaves out stands last."""

from . import correctness, memory, sampling, training
from .emoji import EMOJI


PARTS = (
    *correctness.PARTS,
    *sampling.MAIN,
    *training.MAIN,
    *sampling.GRAPHS,
    sampling.STUDENT,
    memory.MEMORY,
    sampling.KERNELS,
    sampling.DIT,
    *sampling.MRAR,
    training.SHARDING,
    sampling.AUTOTUNED,
    EMOJI,
)
