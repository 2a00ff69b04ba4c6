"""The model card of a finished run, with its loss curve and samples beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.model_card import CARD_NAME, training_card

from .config import TrainConfig, to_dict


def write_card(
    folder: Path,
    pipeline: TransDiffPipeline,
    config: TrainConfig,
    data: str,
    metrics: Sequence[Mapping[str, float]],
) -> None:
    """README.md in the pipeline's folder, from what the run left in `config.output`.

    Args:
        data: the run's line on its data, beginning with "data: ".
        metrics: the lines of metrics.jsonl.
    """
    output = Path(config.output)
    previews = sorted(output.glob("previews/step-*.png"))
    found = {"Samples": ("samples.png", previews[-1:]), "Loss": ("loss.png", list(output.glob("loss.png")))}
    pictures = {}
    for caption, (name, sources) in found.items():
        if sources:
            shutil.copyfile(sources[0], folder / name)
            pictures[caption] = name
    sentence = f"Trained on {data.removeprefix('data: ')}."
    text = training_card(pipeline, output.name, to_dict(config), sentence, metrics, pictures)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
