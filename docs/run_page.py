"""Run the Python blocks of a page, in order, in a folder of your choice: what the page shows is what runs.

    python docs/run_page.py docs/tour.md --folder docs/images/tour

makes the pictures of the tour.
"""

import argparse
import contextlib
import re
from pathlib import Path


def python_blocks(page: Path) -> list[str]:
    """The fenced Python blocks of a Markdown page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_page(page: Path, folder: Path, num_inference_steps: int | None = None) -> None:
    """Run the page's blocks as one program in `folder`, where it leaves its files.

    Args:
        num_inference_steps: wherever the page names a number of steps, take this one: for a test, to be done sooner.
    """
    namespace: dict = {}
    with contextlib.chdir(folder):
        for block in python_blocks(page):
            if num_inference_steps is not None:
                block = re.sub(r"num_inference_steps=\d+", f"num_inference_steps={num_inference_steps}", block)
            exec(compile(block, page.name, "exec"), namespace)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the page's code runs and leaves its files")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    run_page(options.page.resolve(), options.folder)


if __name__ == "__main__":
    main()
