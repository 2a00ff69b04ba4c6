"""Ways to need less memory: what a call takes of it, and of time."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from transdiff_pipelines import TransDiffPipeline

from ..common.machine import CallClock, PeakMemory
from ..common.parts import Part, Skip, attempt
from ..common.peers import random_pipeline
from ..common.report import markdown_table, significant
from .common import Shared


STEPS = 10
CPU = torch.device("cpu")
Prepare = Callable[[TransDiffPipeline, torch.device], None]


def networks(pipeline: TransDiffPipeline) -> tuple[nn.Module, nn.Module]:
    return pipeline.condition_encoder, pipeline.transformer


def on_the_device(pipeline: TransDiffPipeline, device: torch.device) -> None:
    pipeline.to(device)


def model_offload(pipeline: TransDiffPipeline, device: torch.device) -> None:
    if device.type == "cpu":
        raise Skip("it needs a device beside the CPU")
    pipeline.enable_model_cpu_offload(device=device)


def group_offload(pipeline: TransDiffPipeline, device: torch.device, kind: str, stream: bool) -> None:
    if stream and device.type == "cpu":
        raise Skip("streams are those of a GPU")
    for network in networks(pipeline):
        apply_group_offloading(
            network,
            onload_device=device,
            offload_device=CPU,
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            use_stream=stream,
        )


def layerwise_casting(pipeline: TransDiffPipeline, device: torch.device) -> None:
    for network in networks(pipeline):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)  # type: ignore[operator]
    pipeline.to(device)


def quantized(pipeline: TransDiffPipeline, device: torch.device, config: str, compiled: bool = False) -> None:
    try:
        from torchao import quantization
    except ImportError as error:
        raise Skip("torchao is not installed") from error
    pipeline.to(device)
    for network in networks(pipeline):
        quantization.quantize_(network, getattr(quantization, config)())
        if compiled:
            network.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]


FLOAT8 = "Float8DynamicActivationFloat8WeightConfig"
WAYS: dict[str, Prepare] = {
    "all on the device": on_the_device,
    "model offload": model_offload,
    "group offload, blocks": partial(group_offload, kind="block_level", stream=False),
    "group offload, blocks, streams": partial(group_offload, kind="block_level", stream=True),
    "group offload, layers, streams": partial(group_offload, kind="leaf_level", stream=True),
    "layerwise casting to float8": layerwise_casting,
    "torchao, int8 weights": partial(quantized, config="Int8WeightOnlyConfig"),
    "torchao, float8 weights": partial(quantized, config="Float8WeightOnlyConfig"),
    "torchao, float8 weights and activations": partial(quantized, config=FLOAT8),
    "torchao, float8 weights and activations, compiled": partial(quantized, config=FLOAT8, compiled=True),
}


def measure_way(
    shared: Shared, pipeline: TransDiffPipeline, prepare: Prepare, expected: torch.Tensor | None
) -> dict[str, Any]:
    """Seconds of a call, all memory that it needs, and how far its latents are from those of the first way.

    `pipeline` is on the CPU: a way that offloads shall not have had everything on the device before.
    """
    pipeline.set_progress_bar_config(disable=True)
    before = shared.memory_in_use()
    prepare(pipeline, shared.device)
    resident = shared.memory_in_use() - before

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        steps = 2 if shared.tiny else STEPS
        labels = [3, 7, 11, 15]
        result = pipeline(labels, num_inference_steps=steps, generator=generator, output_type="latent")
        return result.images.cpu()

    result = call()
    clocks = [CallClock(shared.device, pipeline.transformer) for _ in range(shared.rounds)]
    for clock in clocks:
        clock.time(call)
    with PeakMemory(shared.device) as peak:
        call()
    error = None if expected is None else ((result - expected).norm() / expected.norm()).item()
    measured = {"seconds": min(clock.total for clock in clocks), "resident_bytes": resident}
    return measured | {"peak_bytes": resident + peak.bytes, "error": error, "latents": result}


def measure_memory(shared: Shared) -> dict[str, Any]:
    """Each way with the same weights and noise."""
    pipeline = random_pipeline(shared.model("transdiff_l"), tiny=shared.tiny).to(torch.bfloat16)
    pipeline.vae = None
    expected, rows = None, {}
    for name, prepare in WAYS.items():
        row = attempt(partial(measure_way, shared, copy.deepcopy(pipeline), prepare, expected))
        gc.collect()  # hooks and models hold each other
        result = row.pop("latents", None)
        expected = result if expected is None else expected
        rows[name] = row
        if shared.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"ways": rows}


def memory_table(result: dict[str, Any]) -> str:
    header = ["L, batch 4, 10 steps", "a call, s", "at rest, GB", "at most, GB", "relative error"]
    rows = []
    for name, row in result["ways"].items():
        if "reason" in row:
            rows.append([name, row["reason"], *["—"] * 3])
            continue
        error = "—" if row["error"] is None else f"{row['error']:.1e}"
        sizes = [significant(row[key] / 1e9) for key in ("resident_bytes", "peak_bytes")]
        rows.append([name, significant(row["seconds"]), *sizes, error])
    return markdown_table(header, rows)


MEMORY = Part(
    "memory",
    "What do offloading, casting and quantisation save, and what do they cost?",
    60,
    measure_memory,
    memory_table,
)
