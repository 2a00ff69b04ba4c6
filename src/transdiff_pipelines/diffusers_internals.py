"""The names that diffusers does not promise to keep: each is looked up here, when it is used.

A release of diffusers that moved one still imports with this package; only what needs the name is refused, with the
reason and the remedy. So setup.py caps no version of diffusers. `tests/test_diffusers_internals.py` lists the names
and fails first where one is gone.
"""

from importlib import import_module
from typing import Any

import diffusers


TESTED_DIFFUSERS = "0.41 to 0.42"
"""The releases with which the tests passed; `make test-versions` runs them with the lowest and the newest."""


def diffusers_internal(module: str, name: str) -> Any:
    """`name` of the module `diffusers.{module}`.

    Raises:
        ImportError: the installed diffusers has no such name.
    """
    try:
        return getattr(import_module(f"diffusers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no diffusers.{module}.{name}, which transdiff_pipelines "
            f"needs for this; it is known to work with diffusers {TESTED_DIFFUSERS}. Install one of those, or a "
            "transdiff_pipelines that knows this diffusers"
        ) from error
