"""A run's networks as what users load: a pipeline folder, or the adapters of a LoRA run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.model.build import TrainingModel, build_pipeline, sampling_settings
from training.model.lora import save_adapters
from training.settings.config import TrainConfig
from transdiff_pipelines import TransDiffPipeline

from .card import write_card


class Export:
    """Writes networks as they are at the moment; the caller decides whether their weights are the averaged ones.

    Args:
        config: of the run.
        vae: goes into the pipeline.
        device: where the pipeline computes.
    """

    def __init__(self, config: TrainConfig, vae: AutoencoderKL, device: torch.device) -> None:
        self.config, self.vae, self.device = config, vae, device
        self.name = "pipeline" if config.lora.rank is None else "lora"
        self.sampling = sampling_settings(config)

    def pipeline(self, networks: TrainingModel) -> TransDiffPipeline:
        """The pipeline around whole networks."""
        self.vae.to(self.device)
        return build_pipeline(networks, self.vae, self.sampling, networks.classes)

    def write(self, networks: TrainingModel, folder: Path) -> Path:
        """Write `folder`/pipeline, or of a LoRA run `folder`/lora; returns which."""
        path = folder / self.name
        if self.config.lora.rank is None:
            self.pipeline(networks).save_pretrained(path)
        else:
            save_adapters(networks, path)
        return path

    def write_final(self, networks: TrainingModel, data: str, metrics: Sequence[Mapping[str, float]]) -> Path:
        """Put the result with its model card at OUTPUT/pipeline, or OUTPUT/lora, replacing an older one as a whole.

        Args:
            data: the run's line on its data, for the card.
            metrics: the lines of metrics.jsonl, for the card.
        """
        output = Path(self.config.output)
        partial, final = output / ".final.partial", output / self.name
        shutil.rmtree(partial, ignore_errors=True)
        written = self.write(networks, partial)
        write_card(written, self.pipeline(networks), self.config, data, metrics)
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
        partial.rmdir()
        return final
