"""Every claim about a GPU as a number, in one run of a few minutes on one card.

    python -m benchmarks.gpu --minutes 8 --reference ../TransDiff --output gpu

runs its parts in order of worth for as long as there is time, and writes `gpu.json`, `gpu.md` and pictures anew after
each: a run that is cut off keeps what it has measured, and `--earlier gpu.json` goes on with what is missing. Nothing
is installed. `--device cpu --tiny` rehearses all parts with tiny models, whose times mean nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .common.parts import Part
    from .on_gpu.common import Shared

NEEDED = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "peft", "datasets", "numpy",
    "PIL", "yaml", "matplotlib", "scipy", "tqdm", "typer",
)  # fmt: skip
"""Modules without which nothing runs."""
USEFUL = {
    "pytest": "the tests",
    "pytest_timeout": "the tests",
    "triton": "compiling",
    "torchao": "quantisation",
    "deepspeed": "ZeRO-2",
    "flash_attn": "FlashAttention 2",
    "flash_attn_interface": "FlashAttention 3",
}
"""Modules without which a part, or a row of one, is left out."""
REHEARSED_SECONDS = 1.0
"""The estimate of every part in a rehearsal."""


def home_path(text: str) -> Path:
    """As in `transdiff_pipelines.files`, whose package cannot be imported before `NEEDED` is known to be there."""
    return Path(text).expanduser()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget; parts that do not fit are left out")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, by name (--list); all by default")
    parser.add_argument("--list", action="store_true", help="name the parts with their estimates, and end")
    parser.add_argument("--reference", type=home_path, help="checkout of the released code, to compare with")
    parser.add_argument("--earlier", type=home_path, help="JSON file of an earlier run, whose finished parts are kept")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models: the times mean nothing")
    parser.add_argument(
        "--output", type=home_path, default=Path("gpu"), help="results go to OUTPUT.json, .md and .png"
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """End the program before any work if it could not do any; say what is left out for want of a library."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"benchmarks.gpu: not installed: {', '.join(missing)}. It needs what setup.py names for the train extra, "
            "and installs nothing by itself; CONTRIBUTING.md says how to bring wheels along"
        )
    if options.list:
        return
    # torch's profiler, which counts memory on a CPU, warns of what was allocated before it began.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no CUDA device; rehearse with --device cpu --tiny")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("benchmarks.gpu: the parts are of a GPU's size; add --tiny to rehearse on the CPU")
    if options.reference is not None and not (options.reference / "models" / "transdiff_mrar.py").is_file():
        raise SystemExit(
            f"benchmarks.gpu: --reference {options.reference} has no models/transdiff_mrar.py; name a checkout of the "
            "released code"
        )
    for name, use in USEFUL.items():
        if find_spec(name) is None:
            print(f"without {name}: {use} left out")


def chosen_parts(names: Sequence[str] | None) -> "list[Part]":
    """The parts with these names in order of worth, or all."""
    from .on_gpu.parts import PARTS

    known = {part.name: part for part in PARTS}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise SystemExit(f"benchmarks.gpu: no part {', '.join(unknown)}; there are {', '.join(known)}")
    return [part for part in PARTS if names is None or part.name in names]


def earlier_parts(path: Path | None) -> dict[str, Any]:
    """The finished parts of an earlier run."""
    if path is None:
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        return {name: outcome for name, outcome in parts.items() if outcome["status"] == "done"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"benchmarks.gpu: --earlier {path} is no result of this command ({error!r})") from error


def run(parts: "Sequence[Part]", shared: "Shared", result: dict[str, Any], output: Path) -> bool:
    """Run and write part by part; returns whether the run came to its end."""
    from .common.parts import Stopped, run_part, stopped_by_signals
    from .on_gpu.report import write

    running = None
    try:
        with stopped_by_signals():
            for part in parts:
                running = part.name
                outcome = {"question": part.question, "date": result["machine"]["date"]}
                estimate = REHEARSED_SECONDS if shared.tiny else part.seconds
                outcome |= run_part(part, shared, shared.deadline, estimate)
                result["parts"][part.name] = outcome
                write(result, output)
                reason = f": {outcome['reason']}" if "reason" in outcome else ""
                print(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s{reason}", flush=True)
    except Stopped:
        result["parts"].setdefault(running, {"status": "cut off", "seconds": 0.0, "reason": "the run was stopped"})
        write(result, output)
        print(f"{running}: stopped; {output}.json has the parts before it", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    check(options)
    # What follows imports torch and its company, which are there.
    import torch

    from transdiff_pipelines.files import check_writable

    from .common.machine import describe
    from .common.parts import Deadline
    from .common.report import command_line
    from .on_gpu.common import Shared, be_quiet
    from .on_gpu.correctness import exact_float32
    from .on_gpu.report import markdown

    deadline = Deadline(options.minutes)
    parts = chosen_parts(options.parts)
    if options.list:
        print("\n".join(f"{part.name:18} about {part.seconds:4.0f} s  {part.question}" for part in parts))
        return
    check_writable(options.output.with_suffix(".json"))
    be_quiet()
    exact_float32()
    if options.tiny:
        # What is compiled runs as it is written: a rehearsal shall not wait for kernels.
        torch.compiler.set_stance("force_eager")
    device = torch.device(options.device)
    result = {
        "command": command_line("benchmarks.gpu"),
        "machine": describe(device),
        "rehearsal": options.tiny,
        "parts": earlier_parts(options.earlier),
    }
    left = [part for part in parts if part.name not in result["parts"] and (part.rehearsed or not options.tiny)]
    shared = Shared(device, options.tiny, options.reference, deadline, options.output)
    ended = run(left, shared, result, options.output)
    print(markdown(result))
    statuses = [outcome["status"] for outcome in result["parts"].values()]
    sys.exit(0 if ended and "failed" not in statuses else 1)


if __name__ == "__main__":
    main()
