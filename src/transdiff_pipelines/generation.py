"""Drawing as the command line and the web demo do it: the settings of an image, and the image of its settings.

`GenerationSettings` says all that it takes to make an image again; a PNG carries it, `transdiff generate --from`
reads it. Image i of a run has a generator of its own, seeded with seed + i, so that it does not depend on its
neighbours, but for the rounding of a batch of another size.
"""

import copy
import inspect
import json
import os
import shlex
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from PIL import Image, PngImagePlugin

from . import __version__
from .devices import best_device
from .hub_access import check_hub_has
from .models.lora_file import LoraFileError, digest_of
from .pipelines import TransDiffPipeline
from .sources import is_repository_name, model_source


SCHEDULER_CLASSES: dict[str, str] = {
    "euler-maruyama": "FlowMatchEulerMaruyamaScheduler",
    "sde-multistep": "FlowMatchSDEMultistepScheduler",
    "flow-map": "FlowMapScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The samplers that were tried on this flow: two of the paper's SDE, that of flow maps, then diffusers' of the
probability-flow ODE.
"""

SDE_SAMPLERS = ("euler-maruyama", "sde-multistep")
"""Those that have a drift and a diffusion scale."""

DTYPES = ("float32", "bfloat16", "float16")

PNG_KEY = "transdiff"
"""Keyword of the PNG text chunk that holds the settings as JSON."""

MAX_IMAGES = 100_000
MAX_STEPS = 10_000
MAX_SEED = 2**63 - 1
MAX_SCALE = 1000
MAX_LORAS = 100


@dataclass(frozen=True)
class GenerationSettings:
    """How an image was made, or a grid of images: `count` of each label, image i with the seed `seed` + i.

    Args:
        labels: class ids, each at least 0.
        model: folder or Hub repository of the pipeline, or the name of a bundled one; None is the digits.
        count: images of each label, next to one another.
        seed: 0..2^63-1, of the first image.
        guidance_scale: 0..1000, one number, or one for each image of the AR sequence; None is the model's
            recommendation.
        num_inference_steps: denoising steps for each image of the AR sequence, 1..10,000; None is the model's
            recommendation, or else 100.
        scheduler: a key of `SCHEDULER_CLASSES`; None is the model's own.
        drift_scale, diffusion_scale: of the SDE samplers, 0..1000; None is the model's own.
        dtype: number format of the weights, one of `DTYPES`.
        batch_size: images drawn at once. Another one rounds differently.
        version: of the package that drew.
        lora: files, folders or Hub repositories of LoRA adapters, which are all active.
        lora_scale: -1000..1000, the weight of each of them; empty is 1 for all.
        lora_digest: what the adapters held when they were loaded, see `load_loras`; empty is not known.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of its range, or more than 100,000 images.
    """

    labels: tuple[int, ...]
    model: str | None = None
    count: int = 1
    seed: int = 0
    guidance_scale: float | tuple[float, ...] | None = None
    num_inference_steps: int | None = None
    scheduler: str | None = None
    drift_scale: float | None = None
    diffusion_scale: float | None = None
    dtype: str = "float32"
    batch_size: int = 32
    version: str = __version__
    lora: tuple[str, ...] = ()
    lora_scale: tuple[float, ...] = ()
    lora_digest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The settings may come from the image of a stranger, so that every value and its type is checked.
        _check(isinstance(self.labels, tuple) and len(self.labels) > 0, "labels", self.labels, "class ids")
        for label in self.labels:
            _check_int("labels", label, 0, MAX_SEED)
        _check_int("count", self.count, 1, MAX_IMAGES)
        if self.num_images > MAX_IMAGES:
            raise ValueError(f"{self.num_images:,} images are asked for; draw at most {MAX_IMAGES:,} at a time")
        _check_int("seed", self.seed, 0, MAX_SEED - self.num_images)
        if self.num_inference_steps is not None:
            _check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_int("batch_size", self.batch_size, 1, MAX_IMAGES)
        _check(self.guidance_scale != (), "guidance_scale", self.guidance_scale, "one number or more")
        for name in ("guidance_scale", "drift_scale", "diffusion_scale"):
            value = getattr(self, name)
            per_image = name == "guidance_scale" and isinstance(value, tuple)
            for scale in value if per_image else () if value is None else (value,):
                _check_scale(name, scale)
        _check(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        names = ", ".join(SCHEDULER_CLASSES)
        _check(self.scheduler in (None, *SCHEDULER_CLASSES), "scheduler", self.scheduler, f"one of {names}")
        # Both are printed to a terminal, where control characters could do harm.
        _check(self.model is None or _is_name(self.model), "model", self.model, "a folder or Hub repository")
        _check(_is_name(self.version), "version", self.version, "that of the package")
        self._check_loras()

    def _check_loras(self) -> None:
        for name, expected in (("lora", "files or folders"), ("lora_digest", "digests of their contents")):
            values = getattr(self, name)
            is_list = isinstance(values, tuple) and len(values) <= MAX_LORAS and all(map(_is_name, values))
            _check(is_list, name, values, f"at most {MAX_LORAS} {expected}")
        _check(isinstance(self.lora_scale, tuple), "lora_scale", self.lora_scale, "one number for each LoRA")
        for scale in self.lora_scale:
            _check_scale("lora_scale", scale, low=-MAX_SCALE)
        for name in ("lora_scale", "lora_digest"):
            values = getattr(self, name)
            if values and len(values) != len(self.lora):
                raise ValueError(f"{name} has {len(values)} value(s) for {len(self.lora)} LoRA; give one for each")

    @property
    def num_images(self) -> int:
        return len(self.labels) * self.count

    @property
    def label_of_each(self) -> list[int]:
        """The label of every image in turn."""
        return [label for label in self.labels for _ in range(self.count)]

    def image(self, number: int) -> "GenerationSettings":
        """The settings that draw image `number` alone."""
        return replace(self, labels=(self.labels[number // self.count],), count=1, seed=self.seed + number)

    def resolved(self, pipe: TransDiffPipeline) -> "GenerationSettings":
        """With what is left to the model filled in, so that a later change of its defaults does not matter."""
        guidance = pipe.config.guidance_scale if self.guidance_scale is None else self.guidance_scale
        guidance = 1.0 if guidance is None else guidance
        own = make_scheduler(pipe.scheduler, self.scheduler, self.drift_scale, self.diffusion_scale)
        scheduler = self.scheduler or own_sampler(pipe)
        has_scales = scheduler in SDE_SAMPLERS
        steps = self.num_inference_steps or with_scheduler(pipe, own).recommended_num_inference_steps
        return replace(
            self,
            num_inference_steps=steps,
            guidance_scale=tuple(guidance) if isinstance(guidance, (list, tuple)) else float(guidance),
            scheduler=scheduler,
            drift_scale=own.config.drift_scale if has_scales else None,
            diffusion_scale=own.config.diffusion_scale if has_scales else None,
        )

    def png_info(self) -> PngImagePlugin.PngInfo:
        """For `Image.save(path, pnginfo=...)`: one text chunk, JSON under `PNG_KEY`."""
        info = PngImagePlugin.PngInfo()
        info.add_text(PNG_KEY, json.dumps(asdict(self)))
        return info

    @classmethod
    def from_image(cls, image: Image.Image | str | os.PathLike[str]) -> "GenerationSettings":
        """The settings in a PNG of `transdiff generate` or the web demo, checked as if a stranger had written them.

        Raises:
            OSError: there is no such file, or it is no image.
            ValueError: the image carries no settings, or such as this version cannot follow.
        """
        if isinstance(image, Image.Image):
            name, text = "the image", image.info.get(PNG_KEY)
        else:
            name, text = str(image), _png_text(image)
        if not isinstance(text, str):
            raise ValueError(f"{name} carries no settings; expected a PNG that transdiff drew, not saved anew since")
        try:
            stored = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the settings in {name} are not JSON; expected a PNG that transdiff drew") from error
        if not isinstance(stored, dict) or "labels" not in stored:
            raise ValueError(f"the settings in {name} name no labels; expected a PNG that transdiff drew")
        unknown = stored.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"the settings in {name} have {sorted(unknown)!r}, unknown to transdiff_pipelines {__version__}; "
                f"they were written by {stored.get('version', 'another version')!r}: install that"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the settings in {name} are wrong: {error}") from error

    def command_line(self, labels: Sequence[str] | None = None) -> str:
        """The `transdiff generate` command that draws this, quoted for a POSIX shell.

        Args:
            labels: as the user wrote them, in place of the class ids of these settings.
        """
        scales = self.guidance_scale
        guidance = ",".join(map(str, scales)) if isinstance(scales, tuple) else scales
        options: list[tuple[str, Any]] = [
            ("--model", self.model),
            ("--count", None if self.count == 1 else self.count),
            ("--seed", self.seed),
            ("--guidance-scale", guidance),
            ("--num-inference-steps", self.num_inference_steps),
            ("--scheduler", self.scheduler),
            ("--drift-scale", self.drift_scale),
            ("--diffusion-scale", self.diffusion_scale),
            *(("--lora", source) for source in self.lora),
            ("--lora-scale", ",".join(map(str, self.lora_scale)) or None),
            ("--dtype", self.dtype),
            ("--batch-size", self.batch_size if self.num_images > 1 else None),
        ]
        given = [part for option, value in options if value is not None for part in (option, str(value))]
        return shlex.join(["transdiff", "generate", *map(str, labels or self.labels), *given])


def _png_text(path: str | os.PathLike[str]) -> str | None:
    """The settings as they stand in a PNG file; its pixels are not decoded."""
    try:
        # Not by `Image.open`, which refuses pictures above a number of pixels: a large grid would have no settings.
        with PngImagePlugin.PngImageFile(path) as image:
            return image.info.get(PNG_KEY)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is not a PNG, or a damaged one; only PNGs carry settings") from error


def _check(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        shown = repr(value)
        raise ValueError(f"{name} is {shown if len(shown) < 80 else shown[:77] + '...'}; expected {expected}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} {value!r:.40} is a {type(value).__name__}; expected an int")
    _check(low <= value <= high, name, value, f"{low} to {high}")


def _check_scale(name: str, value: object, low: float = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} {value!r:.40} is a {type(value).__name__}; expected a number")
    _check(low <= value <= MAX_SCALE, name, value, f"{low} to {MAX_SCALE}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def own_sampler(pipe: TransDiffPipeline) -> str | None:
    """The name in `SCHEDULER_CLASSES` of the pipeline's scheduler, if it has one."""
    names = {class_name: name for name, class_name in SCHEDULER_CLASSES.items()}
    return names.get(type(pipe.scheduler).__name__)


def samplers_for(pipe: TransDiffPipeline) -> list[str]:
    """The names in `SCHEDULER_CLASSES` of what can sample the pipeline's model; that of flow maps no other one."""
    is_flow_map = pipe.transformer.config.num_flow_map_layers > 0
    return [name for name in SCHEDULER_CLASSES if is_flow_map or name != "flow-map"]


def make_scheduler(
    own: SchedulerMixin,
    name: str | None = None,
    drift_scale: float | None = None,
    diffusion_scale: float | None = None,
) -> SchedulerMixin:
    """The scheduler called `name`, configured as the model's `own` but for the scales that are given.

    Raises:
        ValueError: no scheduler has that name, or it has no such scale.
    """
    if name is not None and name not in SCHEDULER_CLASSES:
        raise ValueError(f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULER_CLASSES)}")
    cls: type[SchedulerMixin] = getattr(diffusers, SCHEDULER_CLASSES[name]) if name else type(own)
    scales = {"drift_scale": drift_scale, "diffusion_scale": diffusion_scale}
    scales = {key: value for key, value in scales.items() if value is not None}
    if not (name or scales):
        return own
    if scales and "drift_scale" not in inspect.signature(cls).parameters:
        samplers = ", ".join(SDE_SAMPLERS)
        raise ValueError(f"{next(iter(scales))} is for the SDE samplers ({samplers}); {cls.__name__} has none")
    return cls.from_config(own.config, **scales)


def draw(
    pipe: TransDiffPipeline,
    settings: GenerationSettings,
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
) -> Iterator[Image.Image]:
    """The images of the settings in turn, drawn in batches. The pipeline keeps its own scheduler all the while.

    Its weights are used as they are: `settings.model`, `dtype` and `lora` are the loader's business.

    Raises:
        ValueError, TypeError: a setting does not fit this pipeline.
    """
    scheduler = make_scheduler(pipe.scheduler, settings.scheduler, settings.drift_scale, settings.diffusion_scale)
    pipe = with_scheduler(pipe, scheduler)
    labels = settings.label_of_each
    guidance = settings.guidance_scale
    for start in range(0, len(labels), settings.batch_size):
        batch = range(len(labels))[start : start + settings.batch_size]
        yield from pipe(
            [labels[number] for number in batch],
            list(guidance) if isinstance(guidance, tuple) else guidance,
            settings.num_inference_steps,
            [torch.Generator().manual_seed(settings.seed + number) for number in batch],
            callback_on_step_end=callback_on_step_end,
        ).images


def with_scheduler(pipe: TransDiffPipeline, scheduler: SchedulerMixin) -> TransDiffPipeline:
    """A pipeline of the same models and settings with a scheduler of its own."""
    twin = copy.copy(pipe)
    twin.scheduler = scheduler
    return twin


def image_grid(images: Sequence[Image.Image], count: int) -> Image.Image:
    """All images in one, `count` of each label: a row for each label, or as square as one row or column allows."""
    rows, columns = grid_shape(len(images), count)
    return make_image_grid(list(images), rows=rows, cols=columns)


def grid_shape(number: int, count: int) -> tuple[int, int]:
    """Rows and columns of a grid of `number` images, `count` of each label."""
    if 1 < count < number:
        columns = count
    else:  # the smallest divisor that makes the grid at least as wide as high
        columns = next(n for n in range(1, number + 1) if number % n == 0 and n * n >= number)
    return number // columns, columns


def load_pipeline(model: str | None = None, dtype: str = "float32", device: str | None = None) -> TransDiffPipeline:
    """The pipeline that `model_source` finds for a name, None being the digits; on the accelerator if there is one.

    Raises:
        ValueError: `model` is a file, or the device cannot be used here.
        OSError: there is no such folder, or it is no pipeline's.
    """
    place, source = _device(device), model_source(model)
    with without_loading_bars():
        return TransDiffPipeline.from_pretrained(source, dtype=getattr(torch, dtype)).to(place)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Let diffusers load without a progress bar: what a command shows is the progress of its own work."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def load_loras(pipe: TransDiffPipeline, settings: GenerationSettings) -> GenerationSettings:
    """Add the LoRA adapters of the settings to the pipeline, each weighed by its scale.

    Returns:
        The settings with each scale, and with a digest of each adapter's contents: a path alone does not tell whether
        the adapter was trained further since.

    Raises:
        FileNotFoundError: an adapter is not there.
        ValueError: it cannot be read, or does not fit the pipeline.
    """
    if not settings.lora:
        return settings
    digests, names = [], [f"lora_{number}" for number in range(len(settings.lora))]
    for name, lora in zip(names, settings.lora, strict=True):
        source = lora_source(lora)
        try:
            digests.append(digest_of(*pipe.lora_state_dict(source, return_lora_metadata=True)))
            pipe.load_lora_weights(source, adapter_name=name)
        except (LoraFileError, OSError) as error:
            raise ValueError(f"LoRA {lora}: {error}") from error
    scales = settings.lora_scale or (1.0,) * len(names)
    pipe.set_adapters(names, list(scales))
    return replace(settings, lora_scale=scales, lora_digest=tuple(digests))


def lora_source(lora: str) -> str:
    """What `load_lora_weights` loads for `lora`; OSError where nothing is there, or where the Hub cannot be asked."""
    place = Path(lora).expanduser()
    if place.exists():
        return str(place)
    if is_repository_name(lora):
        check_hub_has(lora)
        return lora
    raise FileNotFoundError(
        f"LoRA {lora} does not exist; expected the file or folder of an adapter, the folder of the run that trained "
        "it, or a Hub OWNER/NAME. If it has moved, name its place with --lora"
    )


def _device(name: str | None) -> torch.device:
    best = best_device()
    if name is None:
        return best
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here; this machine's best is {str(best)!r}") from error
