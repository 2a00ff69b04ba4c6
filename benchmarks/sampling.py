"""Time, memory and operations of sampling, side by side with peers in one run of alternating calls.

    python -m benchmarks.sampling --models transdiff_b --steps 4 --reference ../TransDiff --dit --output sampling

writes `sampling.json`, `sampling.md` and `sampling.png`. A call goes from class labels to latents, with the published
guidance. Fewer steps than the paper's 100 make the run short; the full call is then computed from the measured parts,
and the column says so.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator, NullLocator

from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path
from transdiff_pipelines.presets import PUBLISHED, published_model

from .common.machine import DTYPES, CallClock, PeakMemory, describe, matrix_product_rate, synchronize
from .common.operations import Operations, limit_arithmetic
from .common.peers import (
    COMPILE_MODES,
    DIT_STEPS,
    FlowMapStudent,
    OurFloat32,
    OurPipeline,
    Peer,
    ReleasedCode,
    Setting,
    flow_map_students,
    load_peers,
)
from .common.report import command_line, markdown_table, plt, save_figure, significant, write_json, write_text


# Seconds per image in the paper's Table 1, on a GPU of the A800 class.
DIT_PAPER_SECONDS = 45.0
NOISE_SEED = 1
CHECKED_STEPS = 2
# The entry of a result that says how far our final latents are from those of a peer.
ERROR_NAMES = {ReleasedCode.name: "relative_error_to_released", OurFloat32.name: "relative_error_to_float32"}
RATIOS = ("seconds", "step_seconds", "cpu_seconds", "cpu_step_seconds", "full_seconds")


def measure(peers: Sequence[Peer], setting: Setting, rounds: int, dit_steps: int) -> list[dict[str, Any]]:
    """A row for each peer; in each round everyone is called once, the order turned round from one to the next."""
    clocks = {peer.name: [clock_of(peer, setting) for _ in range(rounds)] for peer in peers}
    steps = {peer.name: steps_of(peer, setting, dit_steps) for peer in peers}
    first = {}
    for peer in peers:
        clock = clock_of(peer, setting)
        clock.time(partial(peer.sample, steps[peer.name]))
        first[peer.name] = clock.total
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            clocks[peer.name][number].time(partial(peer.sample, steps[peer.name]))
    rows = []
    for peer in peers:
        row = row_of(peer, setting, steps[peer.name], clocks[peer.name], first[peer.name])
        operations = Operations.of(peer.sample, peer.network)
        with PeakMemory(setting.device) as peak:
            peer.sample(1)
        row |= {"flops_before": operations.before, "flops_step": operations.step, "working_bytes": peak.bytes}
        rows.append(row)
    return rows


def steps_of(peer: Peer, setting: Setting, dit_steps: int) -> int:
    """The denoising steps to run of a peer, for each image."""
    if isinstance(peer, FlowMapStudent):
        return peer.full_steps
    return dit_steps if peer.full_steps == DIT_STEPS else setting.steps


def images_of(peer: Peer, setting: Setting) -> int:
    """How many images the peer makes one after the other."""
    return setting.model.num_images if peer.full_steps != DIT_STEPS else 1


def clock_of(peer: Peer, setting: Setting) -> CallClock:
    return CallClock(setting.device, peer.network, images_of(peer, setting))


def row_of(peer: Peer, setting: Setting, steps: int, clocks: list[CallClock], first: float) -> dict[str, Any]:
    """The times of one peer; lists have an entry a round."""
    num_images = images_of(peer, setting)
    calls = num_images * peer.full_steps
    full_seconds = [clock.outside + calls * clock.step for clock in clocks]
    return {
        "peer": peer.name,
        "model": setting.model.folder if num_images == setting.model.num_images else "DiT-XL/2",
        "batch_size": setting.batch_size,
        "dtype": str(peer.setting.dtype).removeprefix("torch."),
        "compiled": peer.compiled,
        "steps": steps,
        "load_seconds": peer.load_seconds,
        "first_call_seconds": first,
        "seconds": [clock.total for clock in clocks],
        "cpu_seconds": [clock.cpu for clock in clocks],
        "step_seconds": [clock.step for clock in clocks],
        "cpu_step_seconds": [clock.cpu_step for clock in clocks],
        "median_seconds": statistics.median(clock.total for clock in clocks),
        "median_step_seconds": statistics.median(clock.step for clock in clocks),
        "full_steps": peer.full_steps,
        "full_seconds": full_seconds,
        "median_full_seconds": statistics.median(full_seconds),
        "paper_seconds": DIT_PAPER_SECONDS if peer.full_steps == DIT_STEPS else setting.model.seconds_per_image,
        "weight_bytes": peer.weight_bytes(),
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peers over ours, pair by pair: medians and extremes of the ratios of calls, processor times and steps."""
    ours, *others = rows
    comparisons = []
    for other in others:
        comparison = {"peer": other["peer"], "over": ours["peer"], **_identity(ours)}
        # Calls with different numbers of steps cannot be compared; single steps can.
        same_steps = ours["steps"] == other["steps"]
        always = ("step_seconds", "cpu_step_seconds", "full_seconds")
        for name in ("seconds", "cpu_seconds", *always) if same_steps else always:
            ratios = [theirs / mine for theirs, mine in zip(other[name], ours[name], strict=True)]
            comparison[name] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "pairs": len(ratios),
            }
        comparison["operations_step"] = other["flops_step"] / ours["flops_step"]
        full = [row["flops_before"] + row["full_steps"] * row["flops_step"] for row in (other, ours)]
        comparison["operations_full"] = full[0] / full[1]
        comparisons.append(comparison)
    return comparisons


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("model", "batch_size", "dtype", "compiled")}


def relative_error(
    peers: Sequence[Peer], kind: type[OurFloat32] | type[ReleasedCode], setting: Setting, steps: int
) -> float | None:
    """max |ours - theirs| / max |theirs| of final latents with recorded noise; None without a peer of that kind."""
    ours = next((peer for peer in peers if isinstance(peer, OurPipeline)), None)
    theirs = next((peer for peer in peers if isinstance(peer, kind)), None)
    if ours is None or theirs is None:
        return None
    side, count = setting.model.latent_size, setting.model.num_images * (steps - 1)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    shape = (count + 1, setting.batch_size, 16, side, side)
    noise, *step_noise = torch.randn(shape, generator=generator).to(setting.device)
    result, expected = (peer.sample_with_noise(noise, step_noise) for peer in (ours, theirs))
    return ((result - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def decode_seconds(peers: Sequence[Peer], setting: Setting) -> float | None:
    """Seconds in which our pipeline decodes a batch of latents: the better of two."""
    ours = next((peer for peer in peers if isinstance(peer, OurPipeline)), None)
    if ours is None:
        return None
    latents = torch.randn(ours.pipeline.latents_shape(setting.batch_size), device=setting.device)
    seconds = []
    for _ in range(2):
        synchronize(setting.device)
        start = time.perf_counter()
        ours.pipeline.decode_latents(latents, "pt")
        synchronize(setting.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_setting(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one setting; the memory of its models is free again afterwards."""
    peers = load_peers(setting, options.reference, options.dit, options.float32)
    if options.flow_map:
        peers += flow_map_students(setting)
    rows = measure(peers, setting, options.rounds, options.dit_steps)  # first: a first call may compile
    steps = min(setting.steps, CHECKED_STEPS)
    errors = {
        "relative_error_to_released": relative_error(peers, ReleasedCode, setting, steps),
        "relative_error_to_float32": relative_error(peers, OurFloat32, setting, steps),
    }
    decoding = decode_seconds(peers, setting) if options.decode else None
    students = [row for peer, row in zip(peers, rows, strict=True) if isinstance(peer, FlowMapStudent)]
    others = [row for row in rows if row not in students]
    over_students = [compare([row, other])[0] for row in students for other in others]
    del peers
    gc.collect()
    return {
        "rows": rows,
        "comparisons": compare(rows),
        "over_students": over_students,
        "decode_seconds": decoding,
    } | errors


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """All combinations asked for."""
    if options.steps < 2 and any(published_model(name).num_images > 1 for name in options.models):
        raise SystemExit("benchmarks.sampling: --steps must be at least 2 with MRAR, to tell steps from encoder calls")
    return [
        Setting(
            published_model(name),
            batch_size,
            options.steps,
            DTYPES[dtype],
            compiled,
            torch.device(options.device),
        )
        for name, batch_size, dtype, compiled in itertools.product(
            options.models, options.batch_sizes, options.dtypes, options.compile
        )
    ]


def main_table(result: dict[str, Any]) -> str:
    """Rows of all settings as Markdown."""
    header = [
        "model",
        "peer",
        "batch",
        "precision",
        "compiled",
        "load, s",
        "first call, s",
        "steps run",
        "call, s (median)",
        "a step, s",
        "full call, s",
        "s an image",
        "paper, s an image (A800 class)",
        "TFLOP a step",
        "of the matrix-product rate",
        "weights, GB",
        "working memory, GB",
    ]
    rows = []
    pairs = [(entry, row) for entry in result["settings"] for row in entry["rows"]]
    for setting, row in pairs:
        rate = row["flops_step"] / row["median_step_seconds"] / num_images(row) / setting["matrix_product_rate"]
        computed = "" if row["steps"] == row["full_steps"] else "computed, "
        rows.append([
            row["model"],
            row["peer"],
            row["batch_size"],
            row["dtype"],
            compiled_word(row),
            significant(row["load_seconds"]),
            significant(row["first_call_seconds"]),
            row["steps"],
            significant(row["median_seconds"]),
            significant(row["median_step_seconds"]),
            f"{computed}{row['full_steps']} steps: {significant(row['median_full_seconds'])}",
            significant(row["median_full_seconds"] / row["batch_size"]),
            significant(row["paper_seconds"]),
            significant(row["flops_step"] / num_images(row) / 1e12),
            f"{rate:.0%}" if row["dtype"] == setting["rows"][0]["dtype"] else "—",  # the rate is of that precision
            significant(row["weight_bytes"] / 1e9),
            significant(row["working_bytes"] / 1e9),
        ])  # fmt: skip
    return markdown_table(header, rows)


def compiled_word(row: dict[str, Any]) -> str:
    """How the row's networks were compiled; files of earlier runs have true and false there."""
    words = {False: "no", True: "yes", "off": "no", "on": "yes"}
    return words.get(row["compiled"], row["compiled"])


def row_name(row: dict[str, Any]) -> str:
    """A row in the figure."""
    name = f"{row['model']} · {row['peer']} · batch {row['batch_size']} · {row['dtype']}"
    return name if compiled_word(row) == "no" else f"{name} · compiled: {compiled_word(row)}"


def num_images(row: dict[str, Any]) -> int:
    """Images in the row's AR sequence: `flops_step` is of a step of each."""
    return PUBLISHED[row["model"]].num_images if row["model"] in PUBLISHED else 1


def ratio_table(result: dict[str, Any]) -> str:
    """Peers over ours as Markdown; more than 1: ours is faster."""
    header = [
        "model",
        "peer over ours",
        "batch",
        "precision",
        "ours compiled",
        "call: median (min-max)",
        "a step",
        "processor time of a call",
        "of a step",
        "full call",
        "pairs",
        "limit by operations, a step",
        "limit, full call",
        "relative error",
    ]
    rows = []
    for setting in result["settings"]:
        for comparison in setting["comparisons"]:
            error = setting.get(ERROR_NAMES.get(comparison["peer"]))
            rows.append([
                comparison["model"],
                comparison["peer"],
                comparison["batch_size"],
                comparison["dtype"],
                compiled_word(comparison),
                *(_ratio(comparison.get(name)) for name in RATIOS),
                comparison["step_seconds"]["pairs"],
                f"{comparison['operations_step']:.3f}",
                f"{comparison['operations_full']:.3f}",
                "—" if error is None else f"{error:.1e}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def student_table(result: dict[str, Any]) -> str:
    """Full calls over those of the flow maps as Markdown, none without them; more than 1: the flow map is faster."""
    entries = [entry for setting in result["settings"] for entry in setting.get("over_students", [])]
    if not entries:
        return ""
    header = ["model", "flow map", "over it", "full call: median (min-max)", "pairs", "limit by operations"]
    rows = [
        [
            entry["model"],
            entry["over"],
            entry["peer"],
            _ratio(entry["full_seconds"]),
            entry["full_seconds"]["pairs"],
            f"{entry['operations_full']:.1f}",
        ]
        for entry in entries
    ]
    return markdown_table(header, rows)


def parts_lines(result: dict[str, Any]) -> list[str]:
    """What a flow map's call is made of: calls of the decoder, and the encoder's pass, which is all else."""
    rows = [row for setting in result["settings"] for row in setting["rows"] if "flow map" in row["peer"]]
    return [
        f"- {row['model']}, {row['peer']}: {significant(step)} s a call of the decoder, {significant(rest)} s for "
        f"conditions ({significant(row['flops_step'] / images / 1e12)} and "
        f"{significant(row['flops_before'] / 1e12)} TFLOP)"
        for row in rows
        for images, step in [(num_images(row), row["median_step_seconds"])]
        for rest in [row["median_full_seconds"] - images * row["full_steps"] * step]
    ]


def _ratio(ratio: dict[str, float] | None) -> str:
    return "—" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})"


def markdown(result: dict[str, Any]) -> str:
    """The tables of a run with what it takes to understand them."""
    parts = [
        f"`{result['command']}`",
        "\n".join(dict.fromkeys(f"- {machine_line(setting)}" for setting in result["settings"])),
        main_table(result),
        ratio_table(result),
        student_table(result),
        "\n".join(parts_lines(result)),
        "Limits from operation counts:",
        "\n".join(dict.fromkeys(f"- {setting['limit']}" for setting in result["settings"])),
    ]
    lines = [
        f"- {setting['rows'][0]['model']}, batch {setting['rows'][0]['batch_size']}: "
        f"{significant(setting['decode_seconds'])} s"
        for setting in result["settings"]
        if setting["decode_seconds"] is not None
    ]
    if lines:
        parts += ["Decoding latents to pixels, not in the calls above:", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_line(setting: dict[str, Any]) -> str:
    """Where and when a setting was measured."""
    machine = setting["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date']}; matrix products: {setting['matrix_product_rate'] / 1e9:.0f} GFLOP/s in "
        f"{setting['rows'][0]['dtype']}; load average at the start {machine['load_average'][0]:.1f}."
    )


def figure(result: dict[str, Any]) -> Any:
    """Seconds of a step, and ratios to ours with the limit from operations, one bar a row."""
    rows = [row for setting in result["settings"] for row in setting["rows"]]
    names = [row_name(row) for row in rows]
    drawn, (seconds, ratios) = plt.subplots(1, 2, figsize=(12, 0.3 * len(rows) + 1), sharey=True)
    colours = {peer: f"C{i}" for i, peer in enumerate(dict.fromkeys(row["peer"] for row in rows))}
    position = 0
    for setting in result["settings"]:
        for row, comparison in zip(setting["rows"], [None, *setting["comparisons"]], strict=True):
            colour, steps = colours[row["peer"]], row["step_seconds"]
            seconds.barh(position, row["median_step_seconds"], color=colour)
            seconds.hlines(position, min(steps), max(steps), color="black")
            if comparison is not None:
                ratio = comparison["step_seconds"]
                ratios.plot(ratio["median"], position, "o", color=colour)
                ratios.hlines(position, ratio["min"], ratio["max"], color=colour)
                ratios.plot(comparison["operations_step"], position, "|", color="black", markersize=14)
            position += 1
    seconds.set_yticks(range(len(rows)), names, fontsize=8)
    seconds.invert_yaxis()
    seconds.set(xscale="log", xlabel="seconds a denoising step (median, line: all rounds)")
    seconds.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    seconds.xaxis.set_major_formatter("{x:g}")
    seconds.xaxis.set_minor_locator(NullLocator())
    ratios.axvline(1, color="0.7", zorder=0)
    ratios.set_xlabel("times ours (median, line: all pairs; |: limit by operations)")
    drawn.tight_layout()
    return drawn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(PUBLISHED), help="published models, by folder name")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--compile", nargs="+", choices=COMPILE_MODES, default=["off"])
    parser.add_argument("--steps", type=int, default=100, help="denoising steps to run for each image")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each peer")
    parser.add_argument("--reference", type=home_path, help="checkout of the released code, to compare with")
    parser.add_argument("--float32", action="store_true", help="compare half precision with ours in float32")
    parser.add_argument("--dit", action="store_true", help="compare with diffusers' DiT-XL/2")
    parser.add_argument("--dit-steps", type=int, default=DIT_STEPS, help="denoising steps to run of DiT")
    parser.add_argument("--flow-map", action="store_true", help="compare with flow maps of 4 calls and of 1")
    parser.add_argument("--decode", action="store_true", help="time the VAE too")
    parser.add_argument(
        "--earlier", type=home_path, nargs="*", default=[], help="JSON files of earlier runs, shown in the same tables"
    )
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--threads", type=int, help="processor threads; all by default")
    parser.add_argument("--output", type=home_path, required=True, help="results go to OUTPUT.json, .md and .png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rates = {name: matrix_product_rate(device, DTYPES[name]) for name in options.dtypes}
    result: dict[str, Any] = {"command": command_line("benchmarks.sampling"), "settings": []}
    for path in options.earlier:
        result["settings"] += json.loads(path.read_text(encoding="utf-8"))["settings"]
    for setting in settings_of(options):
        print(f"{setting.model.folder}, batch {setting.batch_size}, {setting.dtype}, compiled {setting.compiled}")
        surroundings = {
            "machine": describe(device),
            "matrix_product_rate": rates[str(setting.dtype).removeprefix("torch.")],
            "limit": limit_arithmetic(setting.model.size, setting.model.latent_size**2),
        }
        result["settings"].append(surroundings | run_setting(setting, options))
        write(result, options.output)  # a long run that ends early leaves what it has measured
    write(result, options.output)
    print(markdown(result))


def write(result: dict[str, Any], output: Path) -> None:
    """The JSON file, the tables and the plot."""
    write_json(output.with_suffix(".json"), result)
    write_text(output.with_suffix(".md"), markdown(result))
    save_figure(figure(result), output.with_suffix(".png"))


if __name__ == "__main__":
    main()
