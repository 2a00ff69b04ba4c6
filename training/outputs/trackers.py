"""Reporting to TensorBoard, Weights & Biases and whatever else accelerate has a tracker for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from training.settings.config import ConfigError, TrainConfig, to_dict
from training.settings.schema import flatten


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that do not exist or are not installed.

    Raises:
        ConfigError: naming the first of them.
    """
    installed = set(map(str, get_available_trackers()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"trackers names {name!r}; valid names: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise ConfigError(f"trackers names {name}, which is not installed: pip install {name}, or --trackers=[]")


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers with the configuration as hyper-parameters. TensorBoard's files go to OUTPUT/tensorboard."""
    plain = (int, float, str)
    values = {
        key: value if isinstance(value, plain) else str(value) for key, value in flatten(to_dict(config)).items()
    }
    run = {"name": Path(config.output).name}
    accelerator.init_trackers(config.project, values, init_kwargs={"wandb": run, "trackio": run})


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Show an image in TensorBoard and W&B. Other trackers take images in forms of their own, or take none."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
