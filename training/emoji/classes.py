"""Classes of emoji: the names that the sets share, and which drawing of each class is held out.

**Splits.** One drawing of each class is held out of training, so that a test asks for a known class in an unseen hand.
The hands take turns over the classes, each is held out equally often, and every other class's held-out drawing is one
of validation, the others are of test: a second held-out drawing would take a fifth of what there is to learn from,
and one that is in both would make the test one of the settings that it chose. So validation and test have half of
the classes each. A class's held-out drawing is the same whichever classes are rendered, because it follows from its
place among all of the sets' shared names.

**Relatives.** The six sets are not six independent hands. `fluent-emoji` and `fluent-emoji-flat` are the same designs
with and without gradients, so a third of the held-out drawings has a near relative in training: the median distance to
the nearest training drawing (`training.emoji.judge`) is 19 to 22 for these two sets and 29 to 46 for the other four.
`noto` and `noto-v1` are two editions of one set, but most things were drawn anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from training.data.errors import DataError
from training.data.labels import listed

from .packages import Drawing, EmojiSet


LEAST_DRAWINGS = 5
"""What a class must have: one is held out, and four make a group of the multi-reference model."""

HYPHENATED = ("t-shirt", "e-mail", "jack-o-lantern", "two-hump")

OTHER_THINGS = {
    "cricket": "the game in some sets, the insect in others",
    "black-medium-square": "fluent-emoji-flat has the picture of white-square-button for it",
}
"""Names that the sets share without meaning the same thing, and what goes wrong."""


class HeldOut(NamedTuple):
    """The drawing of a class that no model is trained on."""

    set: str
    split: str
    """validation or test"""


def class_name(name: str) -> str:
    """An icon's name as people say it: "dog-face" is "dog face"."""
    words = name.replace("-", " ")
    for kept in HYPHENATED:
        words = words.replace(kept.replace("-", " "), kept)
    return words


def shared_names(sets: Sequence[EmojiSet]) -> dict[str, list[EmojiSet]]:
    """The sets that have each name, for the names in at least LEAST_DRAWINGS of them, sorted."""
    found = defaultdict(list)
    for emoji in sets:
        for name in emoji.names:
            found[name].append(emoji)
    return {name: found[name] for name in sorted(found) if len(found[name]) >= LEAST_DRAWINGS}


def default_classes(sets: Sequence[EmojiSet]) -> list[str]:
    """Names in all of the sets, without skin tones, without flags of countries, and one name for each drawing."""
    names = [name for name, having in shared_names(sets).items() if len(having) == len(sets) and is_class(name, sets)]
    kept: list[str] = []
    taken: set[tuple[str, Drawing]] = set()
    # A name that is an icon's own in more sets is kept before those that are aliases of it in more sets.
    for name in sorted(names, key=lambda name: (sum(name not in emoji.icons["icons"] for emoji in sets), name)):
        drawings = {(emoji.name, emoji.drawing(name)) for emoji in sets}
        if not drawings & taken:
            kept.append(name)
            taken |= drawings
    return sorted(kept)


def is_class(name: str, sets: Sequence[EmojiSet]) -> bool:
    """Whether a name is one of the default classes, its drawings aside."""
    is_variant = re.search(r"(^|-)skin-tone(-|$)", name) is not None
    is_region = name.startswith(("flag-for-", "regional-indicator")) or (
        name.startswith("flag-") and category(name, sets) == "Flags"
    )
    return not (is_variant or is_region or name in OTHER_THINGS)


def category(name: str, sets: Sequence[EmojiSet]) -> str:
    """What kind of thing a name is, by the first of the sets that says so."""
    return next(filter(None, (emoji.category(name) for emoji in sets if name in emoji.names)), "")


def listed_classes(path: Path, sets: Sequence[EmojiSet]) -> list[str]:
    """The names in a list of classes: one a line, with spaces or hyphens; comments begin with #.

    Raises:
        DataError: if there are none, or some that too few of the sets have.
        OSError: if the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is no list of classes: it is not UTF-8 text") from None
    names = list(dict.fromkeys(re.sub(r"\s+", "-", line) for line in lines if line and not line.startswith("#")))
    if not names:
        raise DataError(f"{path} names no class; one a line is needed, for instance: dog face")
    having = shared_names(sets)
    if missing := [class_name(name) for name in names if name not in having]:
        raise DataError(
            f"{path} names {listed(missing)}, which fewer than {LEAST_DRAWINGS} of the {len(sets)} sets have; leave "
            "them out, or name them as classes.txt of the whole set does"
        )
    return sorted(names)


def held_out(sets: Sequence[EmojiSet]) -> dict[str, HeldOut]:
    """The held-out drawing of each shared name."""
    chosen = {}
    places: defaultdict[int, int] = defaultdict(int)  # one count for each number of sets, so that turns are equal
    for name, having in shared_names(sets).items():
        turn, hand = divmod(places[len(having)], len(having))
        places[len(having)] += 1
        chosen[name] = HeldOut(having[hand].name, ("test", "validation")[turn % 2])
    return chosen
