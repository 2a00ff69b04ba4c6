"""Whose works the bundled models learned from: CC BY asks whoever passes on what is made of them to name the authors.

Each bundled model's folder has the text in a file of its own, so that a copy of the folder, and the wheel, keep it.
"""

from typing import NamedTuple


ATTRIBUTION_NAME = "ATTRIBUTION.md"
"""The file in a bundled model's folder that holds its attribution."""


class Work(NamedTuple):
    """A collection of images that a model was trained on."""

    name: str
    author: str
    licence: str
    url: str


DIGITS_WORKS = [
    Work(
        "Optical Recognition of Handwritten Digits",
        "E. Alpaydin and C. Kaynak",
        "CC BY 4.0",
        "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    ),
]

EMOJI_WORKS = [
    Work("Noto Emoji", "Google Inc.", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    Work("Noto Emoji, version 1", "Google Inc.", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    Work(
        "Twemoji (Twitter Emoji)", "Twitter and other contributors", "CC BY 4.0", "https://github.com/jdecked/twemoji"
    ),
    Work("EmojiOne 2.3", "EmojiOne, now JoyPixels", "CC BY 4.0", "https://github.com/EmojiTwo/emojitwo"),
    Work("Fluent Emoji", "Microsoft Corporation", "MIT", "https://github.com/microsoft/fluentui-emoji"),
    Work("Fluent Emoji Flat", "Microsoft Corporation", "MIT", "https://github.com/microsoft/fluentui-emoji"),
]

WORKS = {"digits": DIGITS_WORKS, "digits-flow-map": DIGITS_WORKS, "emoji": EMOJI_WORKS}
"""By the name of a bundled model, as in `sources.BUNDLED`."""

NOTICE = (
    "The model learned from the works of these authors, scaled to its size, and what it draws resembles them. Whoever "
    "passes on its weights or pictures names the authors, as [CC BY](https://creativecommons.org/licenses/by/4.0/) "
    "asks. None of them endorses the model."
)


def attribution(model: str) -> str:
    """The section of a bundled model's card, in Markdown, that names the authors."""
    lines = ["| work | author | licence |", "| --- | --- | --- |"]
    lines += [f"| [{work.name}]({work.url}) | {work.author} | {work.licence} |" for work in WORKS[model]]
    return "## Attribution\n\n" + NOTICE + "\n\n" + "\n".join(lines)


def credits(model: str) -> str:
    """The same in a sentence, for a page that shows pictures of the model."""
    works = [f"[{work.name}]({work.url}) ({work.author}, {work.licence})" for work in WORKS[model]]
    return f"It learned from {', '.join(works)}."
