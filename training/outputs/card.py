"""The model card of a finished run: of a pipeline, with loss curve and samples, or of LoRA adapters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.settings.config import TrainConfig, to_dict
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.model_card import CARD_NAME, adapter_card, training_card


def write_card(
    folder: Path,
    pipeline: TransDiffPipeline,
    config: TrainConfig,
    data: str,
    metrics: Sequence[Mapping[str, float]],
) -> None:
    """README.md in the folder of a run's result, made from what the run wrote to `config.output`.

    Args:
        pipeline: the result; of a LoRA run the pipeline that is adapted.
        data: the run's line on its data, beginning with "data: ".
        metrics: the lines of metrics.jsonl.
    """
    name, sentence = Path(config.output).name, f"Trained on {data.removeprefix('data: ')}."
    if config.lora.rank is None:
        text = training_card(pipeline, name, to_dict(config), sentence, metrics, copy_pictures(config, folder))
    else:
        text = adapter_card(pipeline, name, str(config.model.start_from), to_dict(config), sentence, metrics)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def copy_pictures(config: TrainConfig, folder: Path) -> dict[str, str]:
    """Put the last preview and the loss curve into `folder`; returns their names by caption."""
    output = Path(config.output)
    previews = sorted(output.glob("previews/step-*.png"))
    found = {"Samples": ("samples.png", previews[-1:]), "Loss": ("loss.png", list(output.glob("loss.png")))}
    pictures = {}
    for caption, (name, sources) in found.items():
        if sources:
            shutil.copyfile(sources[0], folder / name)
            pictures[caption] = name
    return pictures
