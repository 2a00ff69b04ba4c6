"""Names of ImageNet's classes, kept as package data."""

import json
from importlib.resources import files


def imagenet_id2label() -> dict[int, str]:
    """ImageNet-1k's classes in label order: `{0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", ...}`.

    A value lists a class's name and its synonyms (WordNet's), separated by ", ". A few names belong to two classes:
    "crane" is a bird (134) and a machine (517), "maillot" is 638 and 639.
    """
    names = json.loads(files(__package__).joinpath("imagenet_labels.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))
