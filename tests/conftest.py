"""What holds for every test: no network, no access to the user's model cache, one thread; and what may be varied.

The Hub variables are read when huggingface_hub is imported, so they are set before anything else. A test that
talks to a server of its own starts a subprocess with its own values.
"""

import os
import random
import tempfile
from importlib.util import find_spec


_CACHE = tempfile.TemporaryDirectory(prefix="transdiff-tests-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from rounding import vary_rounding  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    # The models here are tiny: several threads only wait for each other.
    parser.addoption("--threads", type=int, default=1, help="threads that torch computes with")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="random order of files, and of the tests of each")
    parser.addoption(
        "--vary-rounding", type=float, metavar="EPS", help="float32 sums are off by up to so many eps, by their shapes"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)
    if config.option.vary_rounding:
        vary_rounding(config.option.vary_rounding)


def pytest_report_header(config: pytest.Config) -> str:
    """What the numbers, and failures that come and go, depend on."""
    options = config.option
    line = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, --threads {options.threads}"
    line += f", --shuffle {options.shuffle}" if options.shuffle is not None else ""
    return line + (f", --vary-rounding {options.vary_rounding:g}" if options.vary_rounding else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests stay together, so that what a file sets up is set up once."""
    if config.option.shuffle is not None:
        order = random.Random(config.option.shuffle)
        order.shuffle(items)
        first = {}
        for place, item in enumerate(items):
            first.setdefault(item.path, place)
        items.sort(key=lambda item: first[item.path])


# `make test-browser` installs what those need.
collect_ignore = [] if find_spec("selenium") else ["browser"]
