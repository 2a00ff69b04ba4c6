"""Put a trained pipeline into the package: in float16, with its attribution, and nothing of where it was trained.

    python -m training.bundle --name digits --model outputs/digits_mrar/pipeline
    python -m training.bundle --name digits-flow-map --model outputs/digits_flow_map/pipeline
    python -m training.bundle --name emoji --model outputs/emoji_mrar/pipeline

The flow map of the digits keeps only the weights that are not those of the bundled digits. The folder is replaced as a
whole: measure the new model afterwards (`training.digits.quality`, `training.emoji.quality`), then write the cards.
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
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.attribution import ATTRIBUTION_NAME, attribution
from transdiff_pipelines.files import home_path
from transdiff_pipelines.generation import without_loading_bars
from transdiff_pipelines.loaders.shared_weights import SHARED_NAME
from transdiff_pipelines.sources import BUNDLED


SHARED = ("condition_encoder", "vae")
TEACHERS = {"digits-flow-map": "digits"}
"""Flow maps, and the bundled models that they share weights with."""


def bundle(model: str | Path, name: str, output: Path | None = None) -> Path:
    """Write the pipeline in folder `model` to the folder of a bundled model, replacing what is there as a whole.

    Weights of a flow map that are, byte for byte, those of its teacher beside it stay there alone.

    Args:
        name: of the bundled model, a key of `BUNDLED`.
        output: another folder to write; the package's own by default.

    Returns:
        The folder that was written.

    Raises:
        ValueError: a flow map shares no weights with its teacher: it was made from another model.
    """
    output = output or BUNDLED[name]
    teacher = output.with_name(BUNDLED[TEACHERS[name]].name) if name in TEACHERS else None
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
        (partial / ATTRIBUTION_NAME).write_text(attribution(name) + "\n", encoding="utf-8")
        if teacher is not None:
            share_weights(partial, teacher)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    return output


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
    parser.add_argument("--name", required=True, choices=BUNDLED, help="which of the bundled models it becomes")
    parser.add_argument("--model", required=True, help="folder of the trained pipeline")
    parser.add_argument("--output", type=home_path, help="default: the package's own folder")
    options = parser.parse_args(arguments)
    output = bundle(options.model, options.name, options.output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
