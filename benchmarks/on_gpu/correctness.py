"""Numbers on the device beside recorded ones, and the tests that are marked for a device."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..common.parts import Part, Skip
from ..common.report import markdown_table
from ..precision import error_to_recorded, errors, golden_runs, random_run
from .common import Shared


ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""Of trajectories in float32, as in tests/test_golden.py."""


def measure_parity(shared: Shared) -> dict[str, Any]:
    """Errors of every golden trajectory: float32 to the recorded numbers, half precision to float32 on this device."""
    rows = []
    for run in islice(golden_runs(shared.device), 1 if shared.tiny else None):
        halves = {row["dtype"]: row["error"] for row in errors(run, ["bfloat16", "float16"], ["nothing"])}
        rows.append({"run": run.name, "float32": error_to_recorded(run), **halves})
    large = [] if shared.tiny else errors(random_run("transdiff_l", 20, shared.device), ["bfloat16"], ["nothing"])
    for row in large:
        rows.append({"run": row["run"], "float32": None, "bfloat16": row["error"], "float16": None})
    return {"rows": rows, "reproduced": all(row["float32"] is None or row["float32"] <= TOLERANCE for row in rows)}


def parity_table(result: dict[str, Any]) -> str:
    header = ["run", "float32 to the recorded", "bfloat16 to float32", "float16 to float32"]
    rows = [
        [
            row["run"],
            *("—" if row[name] is None else f"{row[name]:.1e}" for name in ("float32", "bfloat16", "float16")),
        ]
        for row in result["rows"]
    ]
    verdict = "All float32 runs are" if result["reproduced"] else "**Not all float32 runs are**"
    return f"{verdict} within {TOLERANCE:g} of the authors' numbers.\n\n{markdown_table(header, rows)}"


def run_marked_tests(shared: Shared) -> dict[str, Any]:
    """`pytest -m device`, in a process of its own that may go on for as long as there is time."""
    missing = [name for name in ("pytest", "pytest_timeout") if find_spec(name) is None]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider", "tests/test_device.py"]
    command += ["-W", "default"]  # the versions there warn of other things, as in `make test-versions`
    wide = os.environ | {"COLUMNS": "300"}  # for the reasons of failures, which pytest cuts to the terminal's width
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=max(1.0, shared.deadline.left)
        )
    except subprocess.TimeoutExpired as expired:
        raise Skip("the tests did not end in the time that was left") from expired
    lines = done.stdout.strip().splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    if not counts:
        raise RuntimeError(f"pytest ended with {done.returncode} and ran nothing: {done.stdout}{done.stderr}")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"counts": counts, "failures": failures, "output": done.stdout if failures else ""}


def tests_table(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {word}" for word, number in result["counts"].items())
    return (
        "\n".join([f"`python -m pytest -m device`: {counts}.", *(f"- {line}" for line in result["failures"])]) + "\n"
    )


def exact_float32() -> None:
    """float32 products in float32: TF32 rounds their factors to 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


PARTS = (
    Part("parity", "Are the authors' numbers reproduced on the device?", 40, measure_parity, parity_table),
    Part("tests", "Do the tests marked for a device pass?", 60, run_marked_tests, tests_table),
)
