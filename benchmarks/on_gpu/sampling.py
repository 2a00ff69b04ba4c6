"""Sampling in bfloat16: ours in every way of compiling, its peers, the flow map, attention kernels."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..common.machine import CallClock
from ..common.parts import Part, attempt
from ..common.peers import (
    DIT_STEPS,
    STUDENT_CALLS,
    DiT,
    OurPipeline,
    Peer,
    ReleasedCode,
    Setting,
    flow_map_students,
    load_peers,
    random_pipeline,
)
from ..common.report import markdown_table, significant
from ..sampling import compare, compiled_word, decode_seconds, measure, num_images, relative_error
from .common import Shared


STEPS = {1: 25, 64: 5}
"""Denoising steps that are run, by batch size; the call of 100 is computed from them."""
TARGETS = {1: 2.0, 64: 1.5}
"""How many times as fast as the released code ours shall be, by batch size."""
CHECKED_STEPS = 2
BACKENDS = ("native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn", "flash", "_flash_3")
"""diffusers' names: PyTorch's choice and its kernels, FlashAttention 2 and 3."""


def compiled_copy(ours: OurPipeline, mode: str) -> OurPipeline:
    """The same weights once more, compiled."""
    compiled = OurPipeline(replace(ours.setting, compiled=mode), copy.deepcopy(ours.pipeline))
    compiled.name = f"{ours.name}, compiled: {mode}"
    return compiled


def side_by_side(shared: Shared, name: str, batch_sizes: Sequence[int], modes: Sequence[str]) -> dict[str, Any]:
    """Ours uncompiled and in each of the modes beside the released code: the same weights, alternating calls."""
    first = shared.setting(name, batch_sizes[0], STEPS[batch_sizes[0]])
    peers = load_peers(first, shared.reference, with_dit=False)
    ours = next(peer for peer in peers if isinstance(peer, OurPipeline))
    peers += [compiled_copy(ours, mode) for mode in modes]
    settings = []
    for batch_size in batch_sizes:
        setting = shared.setting(name, batch_size, STEPS[batch_size])
        settings.append(measured(shared, peers, setting) | {"target": TARGETS[batch_size]})
        torch.compiler.reset()  # otherwise the next batch size is compiled for sizes of every kind
    return {"settings": settings}


def measured(shared: Shared, peers: Sequence[Peer], setting: Setting, dit_steps: int = DIT_STEPS) -> dict[str, Any]:
    """Rows of all peers at a setting, and each of ours compared with each of the others."""
    for peer in peers:
        peer.setting = replace(peer.setting, batch_size=setting.batch_size, steps=setting.steps)
    rows = measure(peers, setting, shared.rounds, dit_steps)
    mine = [row for peer, row in zip(peers, rows, strict=True) if isinstance(peer, OurPipeline)]
    others = [row for peer, row in zip(peers, rows, strict=True) if not isinstance(peer, OurPipeline)]
    return {
        "rows": rows,
        "comparisons": [compare([row, other])[0] for row in mine for other in others],
        "relative_error_to_released": relative_error(peers, ReleasedCode, setting, CHECKED_STEPS),
        "decode_seconds": decode_seconds(peers, setting),
        "matrix_product_rate": shared.rate,
    }


def beside_dit(shared: Shared) -> dict[str, Any]:
    """L beside DiT-XL/2 with the 250 steps of its paper, at batch 64 a part of them; blocks compiled on both sides."""
    settings = []
    for batch_size, steps in STEPS.items():
        setting = shared.setting("transdiff_l", batch_size, steps, compiled="on")
        pipeline = random_pipeline(setting.model, device=shared.device, tiny=shared.tiny)
        peers = [OurPipeline(setting, pipeline.to(setting.dtype)), DiT(setting)]
        dit_steps = setting.steps if shared.tiny or batch_size > 1 else DIT_STEPS
        settings.append(measured(shared, peers, setting, dit_steps))
        torch.compiler.reset()
    return {"settings": settings}


def flow_map(shared: Shared) -> dict[str, Any]:
    """The student with 4 calls and with 1, blocks compiled, beside the model of 100 steps."""
    settings = []
    for batch_size in (1, 64):
        setting = shared.setting("transdiff_l", batch_size, STEPS[batch_size], compiled="on")
        pipeline = random_pipeline(setting.model, device=shared.device, tiny=shared.tiny)
        peers: list[Peer] = [OurPipeline(setting, pipeline.to(setting.dtype))]
        for calls in STUDENT_CALLS:  # each with networks of its own, which are compiled for it
            peers += flow_map_students(setting, [calls])
        settings.append(measured(shared, peers, setting))
        torch.compiler.reset()
    return {"settings": settings}


def attention_kernels(shared: Shared) -> dict[str, Any]:
    """A denoising step of L at batch 64 with each attention kernel in its decoder; the encoder has PyTorch's."""
    setting = shared.setting("transdiff_l", 64, STEPS[64])
    pipeline = random_pipeline(setting.model, device=shared.device, tiny=shared.tiny).to(setting.dtype)
    peer = OurPipeline(setting, pipeline)

    def step_seconds(backend: str) -> dict[str, Any]:
        pipeline.transformer.set_attention_backend(backend)
        # The last model whose backend is set makes it that of all models without one.
        pipeline.condition_encoder.set_attention_backend("native")
        peer.sample(setting.steps)
        clocks = [CallClock(shared.device, peer.network) for _ in range(shared.rounds)]
        for clock in clocks:
            clock.time(partial(peer.sample, setting.steps))
        return {"step_seconds": statistics.median(clock.step for clock in clocks)}

    return {"kernels": {backend: attempt(partial(step_seconds, backend)) for backend in BACKENDS}}


def attention_table(result: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", f"{1e3 * row['step_seconds']:.3g}" if "step_seconds" in row else row["reason"]]
        for name, row in result["kernels"].items()
    ]
    return markdown_table(["attention in the decoder", "a step of L at batch 64, ms"], rows)


def sampling_table(result: dict[str, Any]) -> str:
    """A row for each peer and batch size, and what they say about the targets."""
    header = [
        "peer", "batch", "compiled", "first call, s", "a step, ms", "steps run", "full call, s", "images a second",
        "of the matrix-product rate", "working memory, GB", "released code over this: a step", "full call",
    ]  # fmt: skip
    rows, lines = [], []
    for setting in result["settings"]:
        ratios = {comparison_key(entry): entry for entry in setting["comparisons"]}
        for row in setting["rows"]:
            ratio = ratios.get((row["peer"], ReleasedCode.name), {})
            rate = row["flops_step"] / row["median_step_seconds"] / num_images(row) / setting["matrix_product_rate"]
            computed = "" if row["steps"] == row["full_steps"] else " (computed)"
            rows.append([
                row["peer"], row["batch_size"], compiled_word(row), significant(row["first_call_seconds"]),
                significant(1e3 * row["median_step_seconds"]), row["steps"],
                f"{row['full_steps']} steps: {significant(row['median_full_seconds'])}{computed}",
                significant(row["batch_size"] / row["median_full_seconds"]), f"{rate:.1%}",
                significant(row["working_bytes"] / 1e9), over(ratio, "step_seconds"), over(ratio, "full_seconds"),
            ])  # fmt: skip
        lines += remarks(setting)
    return markdown_table(header, rows) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def comparison_key(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["over"], entry["peer"]


def over(comparison: dict[str, Any], name: str) -> str:
    return f"{comparison[name]['median']:.2f}" if comparison else "—"


def remarks(setting: dict[str, Any]) -> list[str]:
    """The target, DiT, decoding and the error, where they were measured."""
    lines, batch = [], setting["rows"][0]["batch_size"]
    best: dict[str, tuple[float, str]] = {}
    for entry in setting["comparisons"]:
        found = (entry["full_seconds"]["median"], entry["over"])
        best[entry["peer"]] = max(found, best.get(entry["peer"], found))
    for peer, (ratio, ours) in best.items():
        target = setting.get("target") if peer == ReleasedCode.name else None
        verdict = "" if target is None else f" (target {target:g}: {'met' if ratio >= target else 'not met'})"
        lines.append(f"batch {batch}: a full call of {ours} is {ratio:.2f} times as fast as that of {peer}{verdict}")
    if setting["decode_seconds"] is not None:
        lines.append(f"batch {batch}: decoding the latents takes {significant(setting['decode_seconds'])} s more")
    if setting["relative_error_to_released"] is not None:
        error = setting["relative_error_to_released"]
        lines.append(f"batch {batch}: latents with recorded noise are {error:.1e} from the released code's")
    return lines


def sampling_part(
    suffix: str, name: str, batch_sizes: Sequence[int], mode: str, seconds: float, rehearsed: bool = True
) -> Part:
    ways = "blocks compiled" if mode == "on" else mode
    return Part(
        f"sampling_{suffix}",
        f"How fast does {name} sample, uncompiled and {ways}, beside the released code?",
        seconds,
        lambda shared: side_by_side(shared, name, batch_sizes, (mode,)),
        sampling_table,
        rehearsed,
    )


L, B = "transdiff_l", "transdiff_b"
LARGE = sampling_part("l", L, (64, 1), "on", 70)
BASE = sampling_part("b", B, (64, 1), "on", 50, rehearsed=False)
GRAPHS = (
    sampling_part("l_graphs", L, (1, 64), "reduce-overhead", 110),
    sampling_part("b_graphs", B, (1,), "reduce-overhead", 60, rehearsed=False),
)
MRAR = (
    sampling_part("l_mrar", f"{L}_mrar", (64, 1), "on", 110),
    sampling_part("b_mrar", f"{B}_mrar", (64, 1), "on", 90, rehearsed=False),
)
STUDENT = Part("flow_map", "How fast is a flow-map student with 4 calls and with 1?", 45, flow_map, sampling_table)
KERNELS = Part("attention", "Which attention kernel is the fastest?", 15, attention_kernels, attention_table)
DIT = Part("dit", "How fast does DiT-XL/2 sample with 250 steps?", 45, beside_dit, sampling_table)
AUTOTUNED = sampling_part("l_autotune", L, (64, 1), "max-autotune", 240, rehearsed=False)
