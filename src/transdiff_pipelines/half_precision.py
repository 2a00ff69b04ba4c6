"""Whether half precision is worth its name on this processor.

Instruction sets do not tell: a processor with bfloat16 instructions but without AMX multiplies matrices more slowly in
bfloat16 than in float32, and one without either does it ten to fifty times as slowly. A product of a few
milliseconds does.
"""

import time

import torch


HALF = (torch.bfloat16, torch.float16)
NOTEWORTHY = 1.5
"""Times as long as in float32 from which people are told. Where half precision is as fast, the measurement of a busy
machine stays below."""

_SHAPE = 64, 512, 512  # rows, inputs, outputs: a layer as wide as the smallest models worth a choice of dtype
_ROUNDS = 5


def half_precision_note(dtype: torch.dtype, device: torch.device) -> str | None:
    """A sentence without its full stop that says how much slower `dtype` is here; None if there is nothing to say.

    Measured where `device` is a CPU and `dtype` bfloat16 or float16, which takes milliseconds, or some tenths of a
    second on the slowest processors. torch's random numbers stay as they are.
    """
    if device.type != "cpu" or dtype not in HALF:
        return None
    ratio = slowdown(dtype)
    if ratio < NOTEWORTHY:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} is slow on this processor, its matrix products take {ratio:.1f} times as long as those of float32"


def slowdown(dtype: torch.dtype) -> float:
    """Seconds of a matrix product in `dtype` on the CPU over those in float32, each the best of some."""
    best = {dtype: float("inf"), torch.float32: float("inf")}
    for _ in range(_ROUNDS + 1):  # the first takes longer, and the best of all does not mind it
        for kind in best:
            best[kind] = min(best[kind], _product_seconds(kind))
    return best[dtype] / best[torch.float32]


def _product_seconds(dtype: torch.dtype) -> float:
    rows, inputs, outputs = _SHAPE
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    with torch.inference_mode():
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        return time.perf_counter() - start
