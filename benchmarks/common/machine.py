"""The machine that a number was measured on, and time, memory and matrix products on it."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from training.outputs.metrics import PeakMemory as PeakMemory
from training.outputs.metrics import moment, seconds_between


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SMALLEST_SIDE = 128
LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}
"""Sides of the square matrices whose product is timed; a device of another type takes the CPU's."""
ENOUGH_SECONDS = 0.1


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader must know to compare numbers: processor, threads, versions, date."""
    is_cuda = device.type == "cuda"
    host = _cpu_name() if device.type == "cpu" else f"{_cpu_name()}, its {device.type}"
    return {
        "date": date.today().isoformat(),
        "processor": torch.cuda.get_device_name(device) if is_cuda else host,
        "instructions": None if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "load_average": list(os.getloadavg()),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matrix_product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best rate of a large square matrix product, FLOP/s (two a multiply-add): the practical ceiling.

    The side doubles up to `LARGEST_SIDE`, or until a product takes `ENOUGH_SECONDS`: half precision on a processor
    without instructions for it is fifty times slower than float32, and would take minutes at the largest side.
    """
    side, largest = SMALLEST_SIDE, LARGEST_SIDE.get(device.type, LARGEST_SIDE["cpu"])
    while side < largest and _product_seconds(side, device, dtype, 1) < ENOUGH_SECONDS:
        side *= 2
    return 2 * side**3 / _product_seconds(side, device, dtype, repeats)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """The least time of `repeats` products of two square matrices, after one that is not timed."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class CallClock:
    """The time of one call, split at the entries of one of its modules, the denoising network.

    A step lasts from one entry to the next, the last one of an image left out: with MRAR an encoder call follows it.

    Moments are read from the wall clock, on a GPU from events in its own queue, so that reading them makes nobody
    wait. The processor time of the process is read beside it: on a machine shared with others, with one thread, it is
    the steadier measure.

    Args:
        device: where the call computes.
        network: the module; it is entered as often for each image.
        num_images: images of a sequence, made one after the other.

    Attributes:
        total, cpu: the whole call, by the clock and in processor time; seconds, as all of these.
        step, cpu_step: the median of an image's steps, averaged over the images, whose conditions differ in length.
        outside: what is left of `total` without the steps.
    """

    def __init__(self, device: torch.device, network: torch.nn.Module, num_images: int = 1):
        self.device, self.network, self.num_images = device, network, num_images
        self.total = self.cpu = self.outside = self.step = self.cpu_step = 0.0

    def _mean_step(self, seconds: list[float]) -> float:
        steps = len(seconds) // self.num_images
        images = [seconds[start : start + max(1, steps - 1)] for start in range(0, len(seconds), steps)]
        return statistics.mean(statistics.median(image) for image in images)

    def time(self, call: Callable[[], Any]) -> Any:
        """Run `call` and set the attributes; returns what it returns."""
        entries: list[tuple[Any, float]] = []

        def enter(*_: Any) -> None:
            entries.append((moment(self.device), time.process_time()))

        hook = self.network.register_forward_pre_hook(enter)
        synchronize(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            result = call()
        finally:
            hook.remove()
        last = moment(self.device)
        synchronize(self.device)
        self.total, self.cpu = time.perf_counter() - start, time.process_time() - cpu_start
        if entries:
            ends = [*entries[1:], (last, cpu_start + self.cpu)]
            pairs = list(zip(entries, ends, strict=True))
            self.step = self._mean_step([seconds_between(entry[0], end[0]) for entry, end in pairs])
            self.cpu_step = self._mean_step([end[1] - entry[1] for entry, end in pairs])
        self.outside = self.total - len(entries) * self.step
        return result
