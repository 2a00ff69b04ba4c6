"""Put a trained pipeline into the package as its bundled model: float16 weights, nothing of where it was trained.

python -m training.digits.bundle --model outputs/digits_mrar/pipeline
python -m training.digits.bundle --model outputs/digits_flow_map/pipeline --flow-map
"""

import argparse
import filecmp
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import DIGITS, DIGITS_FLOW_MAP, TransDiffPipeline
from transdiff_pipelines.files import home_path
from transdiff_pipelines.generation import without_loading_bars
from transdiff_pipelines.loaders.shared_weights import SHARED_NAME


SHARED = ("condition_encoder", "vae")


def bundle(model: str | Path, output: Path, teacher: Path | None = None) -> None:
    """Write the pipeline in folder `model` to folder `output`, replacing what is there as a whole.

    Weights that are, byte for byte, those of the pipeline `teacher` beside `output` stay there alone.

    Raises:
        ValueError: `teacher` has none of them: it is not what `model` was made from.
    """
    with without_loading_bars():
        pipeline = TransDiffPipeline.from_pretrained(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as workplace:
        partial = Path(workplace) / output.name
        pipeline.to(dtype=torch.float16).save_pretrained(partial)
        for config in partial.rglob("*.json"):
            entries = json.loads(config.read_text(encoding="utf-8"))
            entries.pop("_name_or_path", None)  # names a folder of the machine that it was trained on
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if teacher is not None:
            share_weights(partial, teacher)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)


def share_weights(folder: Path, teacher: Path) -> None:
    """Remove the weights from `folder` that `teacher`, beside it, has too, and note whose they are."""
    name = "diffusion_pytorch_model.safetensors"
    shared = [part for part in SHARED if filecmp.cmp(folder / part / name, teacher / part / name, shallow=False)]
    if not shared:
        raise ValueError(f"{folder} has no weights in common with {teacher}, so it is not a flow map of it")
    for part in shared:
        (folder / part / name).unlink()
    text = json.dumps(dict.fromkeys(shared, teacher.name), indent=2) + "\n"
    (folder / SHARED_NAME).write_text(text, encoding="utf-8")


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the trained pipeline")
    parser.add_argument("--output", type=home_path, help="default: the package's own folder")
    parser.add_argument("--flow-map", action="store_true", help="the model is the flow map of the bundled one")
    options = parser.parse_args(arguments)
    output = options.output or (DIGITS_FLOW_MAP if options.flow_map else DIGITS)
    bundle(options.model, output, output.with_name(DIGITS.name) if options.flow_map else None)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
