"""What image-to-image and inpainting share: an image's latents, noised to a σ of the grid and denoised from there.

Shapes: B edits, N images in an AR sequence (1 for 1-step AR), C latent channels, s latent side, H = W pixels.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch.nn import functional as F

from ..latents import draw_noise, noise_latents, renoise_latents
from .call_state import CallState
from .checks import CallSettings, check_count, check_present, check_strength
from .conditions import LabelCondition
from .denoising import StepCallback
from .image_inputs import check_images, check_masks, common_batch_size, is_latents
from .pipeline_transdiff import TransDiffPipeline


References = Literal["generated", "edited", "image"]


@dataclass(frozen=True)
class EditInputs:
    """What a call edits, checked. One label, picture or mask may stand for all.

    Attributes:
        labels: class ids `(.,)`.
        picture: pixels `(., 3, H, W)` in [0, 1], or scaled latents `(., C, s, s)` with `latents_given`.
        mask: `(., 1, H, W)` in [0, 1], 1 where to repaint; None is everywhere.
        num_edits: how many different edits there are, each made `num_images_per_label` times.
        runs: ranges of steps to take, see `resampling_runs`; none at strength 0.
    """

    labels: torch.Tensor
    picture: torch.Tensor
    latents_given: bool
    mask: torch.Tensor | None
    num_edits: int
    num_images_per_label: int
    runs: list[range]

    @property
    def batch_size(self) -> int:
        """Number of images to be made."""
        return self.num_edits * self.num_images_per_label

    def expand(self, batch: torch.Tensor) -> torch.Tensor:
        """One row for each image to be made, from one for each edit or one for all."""
        return batch.expand(self.num_edits, *batch.shape[1:]).repeat_interleave(self.num_images_per_label, dim=0)


@dataclass(frozen=True)
class Edit:
    """One edit of B images.

    Attributes:
        image_latents: scaled latents `(B, C, s, s)` of the images.
        noise: standard normal noise of that shape, one for all σ: a step moves along x_σ = (1 - σ) x₀ + σ ε.
        unknown: `(B, 1, s, s)`, where to repaint; None is everywhere.
        sigmas: the σ at each of the scheduler's timesteps, then 0.
    """

    image_latents: torch.Tensor
    noise: torch.Tensor
    unknown: torch.Tensor | None
    sigmas: list[float]

    def noised(self, index: int) -> torch.Tensor:
        """The images' latents at `sigmas[index]` (Eq. 4); at the grid's start pure noise, as in plain generation."""
        # The schedulers' own `scale_noise` and `add_noise` will not do: they read the state of a run, each another
        # part of it.
        sigma = self.sigmas[index]
        return self.noise if index == 0 else noise_latents(self.image_latents, self.noise, sigma)

    def keep_known(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """`latents` at `sigmas[index]` with the known ones put in their places."""
        return latents if self.unknown is None else torch.where(self.unknown, latents, self.noised(index))


def edit_steps(num_inference_steps: int, strength: float) -> range:
    """The last `strength * num_inference_steps` steps, counted as diffusers' pipelines count them."""
    start = int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))
    return range(start, num_inference_steps)


def resampling_runs(steps: range, jump_length: int, jump_n_sample: int) -> list[range]:
    """RePaint's schedule (arXiv 2201.09865, section 4.2): blocks of `jump_length` steps, each `jump_n_sample` times.

    Blocks are counted from the end. One that begins at step 0 goes once: a jump there forgets all there is. Blocks
    that follow each other without a jump are one run, so that a multistep scheduler keeps its history.
    """
    runs: list[range] = []
    bounds = [*range(steps.stop, steps.start, -jump_length), steps.start][::-1]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        for _ in range(jump_n_sample if start > 0 else 1):
            if runs and runs[-1].stop == start:
                runs[-1] = range(runs[-1].start, stop)
            else:
                runs.append(range(start, stop))
    return runs


def jump_back(
    latents: torch.Tensor, sigma: float, sigma_to: float, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Latents at σ with fresh noise up to a larger σ', see `renoise_latents`."""
    noise = draw_noise(latents.shape, generator, latents.device, latents.dtype)
    return renoise_latents(latents, noise, sigma, sigma_to)


class TransDiffEditingPipeline(TransDiffPipeline):
    """Common part of the editing pipelines; the components and the denoising loop are `TransDiffPipeline`'s."""

    # Pixels stay in [0, 1] here, where compositing is exact, and masks stay soft, where it blends.
    pixel_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
    mask_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)

    def _edit(self, settings: CallSettings, inputs: EditInputs, references: References) -> Any:
        """Encode the image, denoise it under the class, decode and composite."""
        with self._begin_call(settings) as call:
            # The noise is drawn before anything else, so that strength 1 starts from that of plain generation.
            noise = self.prepare_latents(inputs.batch_size, settings.generator, settings.latents)
            edit = self._start_edit(settings, inputs, noise)
            on_step_end = self._step_callback(settings)

            def make_image(condition: torch.Tensor) -> torch.Tensor:
                is_reference = call.current_ar_step != self.condition_encoder.num_images - 1
                if not inputs.runs or (is_reference and references == "image"):
                    return edit.image_latents
                if is_reference and references == "generated":
                    return self.denoise(noise, condition, on_step_end=on_step_end, **settings.denoising)
                return self._run_edit(call, settings, edit, condition, inputs.runs, on_step_end)

            labels = inputs.expand(inputs.labels).tolist()
            source = LabelCondition(self._bound_encoder(), labels, settings.guided, len(settings.guidance_scales))
            sequence = self._make_sequence(call, settings, source, make_image)
            return self._decode_edit(sequence[-1], inputs, settings.output_type)

    def _check_edit(
        self,
        settings: CallSettings,
        image: PipelineImageInput | None,
        strength: float,
        references: References,
        mask: torch.Tensor | None = None,
        jump_length: int = 1,
        jump_n_sample: int = 1,
    ) -> EditInputs:
        """Check what is to be edited and how, and that it fits the labels."""
        check_strength(strength)
        check_count("jump_length", jump_length)
        check_count("jump_n_sample", jump_n_sample)
        if references not in get_args(References):
            raise ValueError(f"references is {references!r}; choose one of {get_args(References)}")
        steps = edit_steps(settings.num_inference_steps, strength)
        if jump_n_sample > 1 and steps.start == 0 and jump_length >= len(steps):
            raise ValueError(f"jump_length is {jump_length}, but only jumps shorter than the {len(steps)} steps count")
        latents_given = is_latents(image, self.latents_shape(1))
        if isinstance(image, torch.Tensor) and latents_given:
            picture = image.reshape(-1, *self.latents_shape(1)[1:])
        else:
            check_present(vae=self.vae)
            check_images(image, self.image_side)
            picture = self.pixel_processor.preprocess(image).float()
        labels = torch.tensor(settings.label_ids)
        counts = {"class_labels": len(labels), "images": len(picture)}
        return EditInputs(
            labels=labels,
            picture=picture,
            latents_given=latents_given,
            mask=mask,
            num_edits=common_batch_size(**counts if mask is None else counts | {"masks": len(mask)}),
            num_images_per_label=settings.num_images_per_label,
            runs=resampling_runs(steps, jump_length, jump_n_sample) if steps else [],
        )

    def _start_edit(self, settings: CallSettings, inputs: EditInputs, noise: torch.Tensor) -> Edit:
        """Encode the images and find the σ of the grid."""
        latents = inputs.picture if inputs.latents_given else self.encode_image(inputs.picture)
        unknown = None
        if inputs.mask is not None:
            unknown = inputs.expand(self._unknown_latents(inputs.mask)).to(noise.device)
        self._set_timesteps(settings.num_inference_steps, settings.sigmas)
        return Edit(
            image_latents=inputs.expand(latents.to(noise)),
            noise=noise,
            unknown=unknown,
            sigmas=[*self.scheduler.sigmas[: len(self.scheduler.timesteps)].tolist(), 0.0],
        )

    def _preprocess_mask(self, mask_image: PipelineImageInput | None) -> torch.Tensor:
        """Masks `(., 1, H, W)` in [0, 1], 1 where to repaint."""
        check_present(vae=self.vae)  # whose stride tells the size of the mask
        check_masks(mask_image, self.image_side)
        return self.mask_processor.preprocess(mask_image).float()

    def _unknown_latents(self, mask: torch.Tensor) -> torch.Tensor:
        """Latents to repaint `(., 1, s, s)`, bool: those with a pixel of the mask `(., 1, H, W)` at 0.5 or more.

        A latent that saw one pixel of what is to go has it inside; keeping every other pixel is compositing's part.
        """
        return F.max_pool2d((mask >= 0.5).float(), self.vae_scale_factor) > 0

    def _run_edit(
        self,
        call: CallState,
        settings: CallSettings,
        edit: Edit,
        condition: torch.Tensor,
        runs: list[range],
        callback: StepCallback | None,
    ) -> torch.Tensor:
        """Denoise the noised image, keeping what is known at every step; each run but the first begins with a jump."""

        def on_step_end(i: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            latents = edit.keep_known(tensors["latents"], i + 1)
            replaced = callback(i, timestep, tensors | {"latents": latents}) if callback is not None else {}
            return {"latents": latents} | replaced

        latents = edit.noised(self._grid_index(edit, runs[0].start))
        for previous, run in zip([None, *runs], runs, strict=False):
            if call.interrupt:
                break
            if previous is not None:
                sigma, sigma_to = (edit.sigmas[self._grid_index(edit, step)] for step in (previous.stop, run.start))
                latents = jump_back(latents, sigma, sigma_to, settings.generator)
            latents = self.denoise(latents, condition, on_step_end=on_step_end, steps=run, **settings.denoising)
        return latents

    def _grid_index(self, edit: Edit, step: int) -> int:
        """Where `edit.sigmas` has the σ at which a step begins; the end of the last is its end."""
        return min(step * self.scheduler.order, len(edit.sigmas) - 1)

    def _decode_edit(self, latents: torch.Tensor, inputs: EditInputs, output_type: str) -> Any:
        """Decode; with a mask, the result shows where it is white, and a pixel where it is black is kept exactly."""
        if inputs.mask is None or inputs.latents_given or output_type == "latent":
            return self.decode_latents(latents, output_type)
        generated = self.decode_latents(latents, "pt")
        pixels, mask = (inputs.expand(batch).to(generated) for batch in (inputs.picture, inputs.mask))
        images = torch.where(mask > 0, mask * generated + (1 - mask) * pixels, pixels)
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))
