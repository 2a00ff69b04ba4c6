"""What setup.py declares, without building anything; as a command, pip's constraints for one end of the ranges:

    python tests/declared.py lowest > lowest.txt
    pip install -c lowest.txt -e ".[train]"

Both ends keep the torch of constraints.txt, the one build that the tests are run with.
"""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock


ROOT = Path(__file__).parents[1]


def run_setup() -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments with which setup.py calls `setup`, and the names it defines. setuptools need not be there."""
    setuptools = mock.Mock(spec=ModuleType("setuptools"), setup=mock.Mock(), find_packages=mock.Mock())
    with mock.patch.dict(sys.modules, {"setuptools": setuptools}):
        names = runpy.run_path(str(ROOT / "setup.py"))
    return setuptools.setup.call_args.kwargs, names


def requirements(extras: tuple[str, ...] = ()) -> list[str]:
    """The package's requirements and those of some extras, as setup.py writes them."""
    arguments, _ = run_setup()
    return arguments["install_requires"] + [line for extra in extras for line in arguments["extras_require"][extra]]


def constraints(end: str) -> list[str]:
    """Lines for pip: "lowest" pins what the package and its training need to the lower ends, "newest" only torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = [line for line in lines if line.startswith("torch==")]
    if end == "newest":
        return torch
    if end != "lowest":
        raise SystemExit(f"{end!r} is no end of the ranges; name lowest or newest")
    bounds = [re.match(r"([\w.-]+)>=([\w.]+)", line) for line in requirements(("train",))]
    return torch + [f"{bound[1]}=={bound[2]}" for bound in bounds if bound and bound[1] != "torch"]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
