"""README's picture of the demo: `python tests/browser/screenshot.py docs/images/demo.png`, from the root."""

import argparse
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
from browser.driver import Visitor, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--height", type=int, default=780)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as (address, _):
        visitor = Visitor(address, Path(folder) / "profile", arguments.width, arguments.height)
        try:
            visitor.draw()
            visitor.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
            visitor.driver.save_screenshot(str(arguments.output))
        finally:
            visitor.leave()


if __name__ == "__main__":
    main()
