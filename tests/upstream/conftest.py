"""diffusers' own test mixins on this package's classes, from a checkout of diffusers: `make test-upstream`.

The mixins are in neither diffusers' wheel nor its sdist. `DIFFUSERS` names the checkout; its tests are imported from
there, while diffusers itself stays the installed one. Without it nothing here is collected.
"""

import os
import sys
from pathlib import Path

import diffusers  # noqa: F401  before the checkout is on the path
import pytest


CHECKOUT = os.environ.get("DIFFUSERS", "")
collect_ignore_glob = [] if CHECKOUT else ["test_*.py"]

if CHECKOUT:
    if not (Path(CHECKOUT) / "tests" / "models" / "testing_utils").is_dir():
        raise pytest.UsageError(f"DIFFUSERS={CHECKOUT} is not a checkout of diffusers with tests/models/testing_utils")
    sys.path.insert(0, CHECKOUT)
    # This folder's own `tests` has no `__init__.py`, so the name means the checkout's package.
    sys.modules.pop("tests", None)


def pytest_configure(config: pytest.Config) -> None:
    if CHECKOUT:
        path = list(sys.path)
        from tests.conftest import pytest_configure as register_markers

        sys.path[:] = path  # it puts the checkout's own diffusers there
        register_markers(config)
        for marker in ("cache", "autoround"):  # those that it forgets
            config.addinivalue_line("markers", f"{marker}: of diffusers' tests")
