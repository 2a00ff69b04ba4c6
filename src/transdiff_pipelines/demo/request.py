"""What a visitor asks for, checked and bounded: nothing that a browser sends is taken for granted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.generation import SDE_SAMPLERS, GenerationSettings


MAX_IMAGES = 8
MAX_STEPS = 100
MAX_SCALE = 20.0
MAX_SEED = 2**53 - 1  # JavaScript has no larger whole numbers
MAX_UPLOAD_BYTES = 8 * 2**20
MAX_UPLOAD_PIXELS = 25_000_000
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")

CLASSES, BLEND, PICTURE = "Classes", "Blend", "From a picture"
MODES = (CLASSES, BLEND, PICTURE)


@dataclass(frozen=True)
class DemoRequest:
    """One press of the button.

    Args:
        settings: labels, seed, sampler; for a blend the labels are the two classes, and `count` images are made.
        blend: share of the second class in [0, 1]; None draws each class by itself.
        reference: a picture that starts every sequence, or None.
    """

    settings: GenerationSettings
    blend: float | None = None
    reference: Image.Image | None = None

    @property
    def num_images(self) -> int:
        return self.settings.count if self.blend is not None else self.settings.num_images

    def caption(self, number: int, names: dict[int, str]) -> str:
        """Class and seed of image `number`."""
        seed = f"seed {self.settings.seed + number}"
        if self.blend is not None:
            first, second = (names[label] for label in self.settings.labels)
            return f"{1 - self.blend:.0%} {first} + {self.blend:.0%} {second}, {seed}"
        return f"{names[self.settings.label_of_each[number]]}, {seed}"

    def recipe(self, names: Mapping[int, str] | None = None) -> str:
        """The command that draws the same, with these names of classes; for what the command line does not have, the
        Python that does.
        """
        settings = self.settings
        if self.blend is None and self.reference is None:
            known = names or {}
            return settings.command_line([known.get(label, str(label)) for label in settings.labels])
        numbers = range(settings.seed, settings.seed + self.num_images)
        scales = {
            name: value
            for name, value in [("drift_scale", settings.drift_scale), ("diffusion_scale", settings.diffusion_scale)]
            if value is not None
        }
        arguments = [f"{name}={value}" for name, value in scales.items()]
        scheduler = ", ".join(["pipe.scheduler", repr(settings.scheduler), *arguments])
        guidance = (
            list(settings.guidance_scale) if isinstance(settings.guidance_scale, tuple) else (settings.guidance_scale)
        )
        lines = [
            "import torch",
            "from transdiff_pipelines import blend_conditions" if self.blend is not None else "from PIL import Image",
            "from transdiff_pipelines.generation import load_pipeline, make_scheduler",
            "",
            f"pipe = load_pipeline({settings.model!r})",
            f"pipe.scheduler = make_scheduler({scheduler})",
        ]
        if self.blend is None:
            what = f"{list(settings.labels)}"
            lines.append('picture = Image.open("PICTURE")  # yours')
            more = f"reference_images=[[picture]] * {len(settings.labels)}, "
        else:
            what = "condition_embeds=blended"
            weights = [1 - self.blend, self.blend]
            lines += [
                "def blended(references):",
                f"    parts = [pipe.encode_condition(label, references) for label in {list(settings.labels)}]",
                f"    return blend_conditions(parts, {weights})",
            ]
            more = ""
        lines += [
            f"images = pipe({what}, guidance_scale={guidance}, num_inference_steps={settings.num_inference_steps},",
            f"    {more}num_images_per_label={settings.count},",
            f"    generator=[torch.Generator().manual_seed(seed) for seed in {numbers!r}]).images",
        ]
        return "\n".join(lines)

    def png_info(self, number: int) -> PngImagePlugin.PngInfo:
        """What the PNG of image `number` carries: the settings that `transdiff generate --from` reads, if it can."""
        if self.blend is None and self.reference is None:
            return self.settings.image(number).png_info()
        info = PngImagePlugin.PngInfo()
        info.add_text("transdiff_demo", json.dumps({"image": number, "recipe": self.recipe()}))
        return info


def make_request(
    pipe: TransDiffPipeline,
    model: str | None,
    mode: str,
    labels: list[int] | None,
    first: int | None,
    second: int | None,
    share: float,
    upload: str | None,
    count: float,
    seed: float | None,
    steps: float,
    guidance: float | None,
    scheduler: str,
    drift_scale: float | None,
    diffusion_scale: float | None,
) -> DemoRequest:
    """The request that the page's controls spell.

    Raises:
        ValueError, TypeError: a value is missing or out of bounds; the message is for the visitor.
    """
    if mode not in MODES:
        raise ValueError(f"choose what to draw: {', '.join(MODES)}")
    chosen = [first, second] if mode == BLEND else list(labels or [])
    if not chosen or None in chosen:
        raise ValueError("choose a class first" if mode != BLEND else "choose the two classes to blend")
    num_classes = pipe.condition_encoder.config.num_classes
    ids = tuple(_whole("class", label, 0, num_classes - 1) for label in chosen)
    settings = GenerationSettings(
        labels=ids,
        model=model,
        count=_whole("images of each class", count, 1, MAX_IMAGES),
        seed=_whole("seed", seed, 0, MAX_SEED),
        num_inference_steps=_whole("steps", steps, 1, MAX_STEPS),
        guidance_scale=None if guidance is None else _number("guidance", guidance, MAX_SCALE),
        scheduler=scheduler,
        **_scales(scheduler, drift_scale, diffusion_scale),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
    )
    request = DemoRequest(settings.resolved(pipe))
    if mode == BLEND:
        request = replace(request, blend=round(_number("share of the second class", share, 1.0), 4))
    if request.num_images > MAX_IMAGES:
        raise ValueError(f"these are {request.num_images} images; the demo draws at most {MAX_IMAGES} at a time")
    if mode == PICTURE:
        request = replace(request, reference=open_picture(upload))
    return request


def open_picture(path: str | None) -> Image.Image:
    """An uploaded picture as RGB.

    Raises:
        ValueError: there is none, or it is too large, or no picture.
    """
    if path is None:
        raise ValueError("upload a picture first")
    if Path(path).stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"the file is too large; upload at most {MAX_UPLOAD_BYTES // 2**20} MiB")
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as image:
            # The size is read from the header, so that a picture is decoded only when it is known to be small.
            too_many = image.width * image.height > MAX_UPLOAD_PIXELS
            if not too_many:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        too_many = True
    except Exception as error:  # a broken file fails in as many ways as there are formats
        raise ValueError("this file is not a picture that can be read; upload a PNG, JPEG or WebP file") from error
    raise ValueError(f"the picture has too many pixels; upload at most {MAX_UPLOAD_PIXELS // 10**6} megapixels")


def _scales(scheduler: str, drift_scale: float | None, diffusion_scale: float | None) -> dict[str, Any]:
    """The two scales, for the samplers that have them."""
    if scheduler not in SDE_SAMPLERS:
        return {}
    scales = {"drift_scale": drift_scale, "diffusion_scale": diffusion_scale}
    shown = {name: name.replace("_", " ") for name in scales}
    return {name: _number(shown[name], value, MAX_SCALE) for name, value in scales.items() if value is not None}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise ValueError(f"{name}: expected a whole number from {low} to {high}")
    return int(value)


def _number(name: str, value: Any, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise ValueError(f"{name}: expected a number from 0 to {high:g}")
    return float(value)
