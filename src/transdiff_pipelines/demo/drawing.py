"""A request drawn in a thread of its own, and what there is to see of it meanwhile.

Requests run side by side on the same weights: each has its own pipeline object around them, with the scheduler that
it asks for.
"""

import threading
from collections.abc import Generator
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from PIL import Image

from transdiff_pipelines import TransDiffPipeline, blend_conditions
from transdiff_pipelines.generation import make_scheduler, with_scheduler

from .request import DemoRequest


PREVIEWS_PER_IMAGE = 8


@dataclass(frozen=True)
class Frame:
    """The state of a run.

    Attributes:
        sequence: what is seen so far: for each image of the MRAR sequence, a given one counted, B pictures; the last
            may still be noisy.
        num_images: N, images of the whole sequence.
        step, num_steps: denoising steps done, and all of the run.
        results: the B finished images, in the last frame.
    """

    sequence: list[list[Image.Image]]
    num_images: int
    step: int
    num_steps: int
    results: list[Image.Image] | None = None


def own_pipeline(shared: TransDiffPipeline, request: DemoRequest) -> TransDiffPipeline:
    """A pipeline on the shared weights with the scheduler of one request."""
    settings = request.settings
    scheduler = make_scheduler(shared.scheduler, settings.scheduler, settings.drift_scale, settings.diffusion_scale)
    pipe = with_scheduler(shared, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_frames(shared: TransDiffPipeline, request: DemoRequest) -> Generator[Frame, None, None]:
    """Frames of a run as it goes, the last with the results. Closing the iterator stops the run after its step.

    Raises:
        Whatever the run raises.
    """
    frames: Queue[Frame | BaseException] = Queue()
    stopped = threading.Event()

    def work() -> None:
        try:
            frames.put(_draw(shared, request, frames, stopped))
        except BaseException as error:
            frames.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            frame = frames.get()
            if isinstance(frame, BaseException):
                raise frame
            yield frame
            if frame.results is not None:
                return
    finally:
        stopped.set()


def _draw(shared: TransDiffPipeline, request: DemoRequest, frames: Queue, stopped: threading.Event) -> Frame:
    pipe = own_pipeline(shared, request)
    settings = request.settings
    num_images = pipe.condition_encoder.num_images
    given = _given_images(pipe, request)
    sequence: dict[int, list[Image.Image]] = dict(enumerate(given))

    def watch(pipe: TransDiffPipeline, step: int, _: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if stopped.is_set():
            pipe._interrupt = True
            return {}
        steps_per_image = pipe.num_timesteps // (num_images - len(given))
        done = step % steps_per_image + 1
        if done % max(steps_per_image // PREVIEWS_PER_IMAGE, 1) == 0 or done == steps_per_image:
            sequence[int(pipe.current_ar_step or 0)] = pipe.decode_latents(tensors["latents"])
            frames.put(Frame(list(sequence.values()), num_images, step + 1, pipe.num_timesteps))
        return {}

    guidance = settings.guidance_scale
    results = pipe(
        **_what_to_draw(pipe, request),
        guidance_scale=list(guidance) if isinstance(guidance, tuple) else guidance,
        num_inference_steps=settings.num_inference_steps,
        generator=[torch.Generator().manual_seed(settings.seed + number) for number in range(request.num_images)],
        num_images_per_label=settings.count,
        callback_on_step_end=watch,
    ).images
    sequence[num_images - 1] = results
    return Frame(list(sequence.values()), num_images, pipe.num_timesteps, pipe.num_timesteps, results)


def _what_to_draw(pipe: TransDiffPipeline, request: DemoRequest) -> dict[str, Any]:
    """The arguments of the pipeline's call that say what its images are conditioned on."""
    labels = list(request.settings.labels)
    share = request.blend
    if share is not None:

        def blended(references: torch.Tensor | None) -> torch.Tensor:
            return blend_conditions([pipe.encode_condition(label, references) for label in labels], [1 - share, share])

        return {"condition_embeds": blended}
    if request.reference is not None:
        return {"class_labels": labels, "reference_images": [[request.reference]] * len(labels)}
    return {"class_labels": labels}


@torch.no_grad()
def _given_images(pipe: TransDiffPipeline, request: DemoRequest) -> list[list[Image.Image]]:
    """The uploaded picture as the model sees it, once for each image; nothing without one."""
    if request.reference is None:
        return []
    latents = pipe.encode_references([request.reference], 1, pipe.condition_encoder.num_images)
    return [pipe.decode_latents(latents[:, 0]) * request.num_images]
