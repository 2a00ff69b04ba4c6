"""All parts in order of worth: what a short run leaves out stands last."""

from . import correctness, memory, sampling, training
from .emoji import EMOJI


PARTS = (
    *correctness.PARTS,
    sampling.LARGE,
    training.BASE,
    sampling.STUDENT,
    sampling.KERNELS,
    memory.MEMORY,
    training.LARGE,
    sampling.DIT,
    sampling.BASE,
    *sampling.GRAPHS,
    *sampling.MRAR,
    training.SHARDING,
    sampling.AUTOTUNED,
    EMOJI,
)
