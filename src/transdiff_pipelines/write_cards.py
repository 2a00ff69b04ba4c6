"""The cards in model_cards/, written or checked.

python -m transdiff_pipelines.write_cards --output model_cards
python -m transdiff_pipelines.write_cards --output model_cards --check
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import DIGITS, DIGITS_FLOW_MAP, EMOJI
from .files import home_path, new_file
from .model_card import all_cards


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the cards, or with `--check` exit with 1 and their names where they are not current."""
    parser = argparse.ArgumentParser(description="Write model cards of the published and the bundled checkpoints.")
    parser.add_argument("--output", type=home_path, default=Path("model_cards"), help="folder of the cards")
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless the folder is current")
    options = parser.parse_args(arguments)
    cards = all_cards(DIGITS, DIGITS_FLOW_MAP, EMOJI)
    if options.check:
        present = {path.name: path.read_text(encoding="utf-8") for path in options.output.glob("*.md")}
        stale = sorted(name for name in cards.keys() | present.keys() if cards.get(name) != present.get(name))
        if stale:
            command = f"python -m transdiff_pipelines.write_cards --output {shlex.quote(str(options.output))}"
            print(f"not current in {options.output}: {', '.join(stale)}; run {command}", file=sys.stderr)
            raise SystemExit(1)
        return
    for name, text in cards.items():
        with new_file(options.output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
