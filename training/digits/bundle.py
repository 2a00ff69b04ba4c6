"""Put a trained pipeline into the package as its bundled model: float16 weights, nothing of where it was trained.

python -m training.digits.bundle --model outputs/digits_mrar/pipeline
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import DIGITS, TransDiffPipeline
from transdiff_pipelines.files import home_path
from transdiff_pipelines.generation import without_loading_bars


def bundle(model: str | Path, output: Path) -> None:
    """Write the pipeline in folder `model` to folder `output`, replacing what is there as a whole."""
    with without_loading_bars():
        pipeline = TransDiffPipeline.from_pretrained(model)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(partial)
    for config in partial.rglob("*.json"):
        entries = json.loads(config.read_text(encoding="utf-8"))
        entries.pop("_name_or_path", None)  # names a folder of the machine that it was trained on
        config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the trained pipeline")
    parser.add_argument("--output", type=home_path, default=DIGITS, help="default: the package's own folder")
    options = parser.parse_args(arguments)
    bundle(options.model, options.output)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
