"""The emoji runs of the GPU recipe: a place kept for them."""

from importlib.util import find_spec
from typing import Any

from ..common.parts import Part, Skip
from .common import Shared


def train_emoji(shared: Shared) -> dict[str, Any]:
    """Nothing to run yet.

    Raises:
        Skip: always.
    """
    if find_spec("training.emoji") is None:
        raise Skip("training/emoji does not exist in this checkout")
    raise Skip("training/emoji exists, but benchmarks/on_gpu/emoji.py does not run it yet")


EMOJI = Part("emoji", "What does the emoji recipe reach in the time that is left?", 0, train_emoji, lambda _: "")
