"""From class labels to images: 1-step AR and Multi-Reference Autoregression (MRAR) in one loop.

Shapes: B images asked for, N images in an AR sequence (1 for 1-step AR), C latent channels, s latent side,
M condition tokens, D condition width.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..latents import NUM_TRAIN_TIMESTEPS, scale_latents, unscale_latents, vae_stride
from ..loaders.hub import TransDiffHubMixin
from ..loaders.lora import TransDiffLoraLoaderMixin
from ..loaders.single_file import TransDiffSingleFileMixin
from ..models import ARConditionEncoder, TransDiffTransformer2DModel
from ..models.alignment import align_weights
from ..presets import VAE_DOWNSAMPLE_FACTOR
from .checks import (
    check_components,
    check_count,
    check_generator,
    check_guidance_interval,
    check_latents,
    check_output,
    check_scheduler,
    custom_sigmas,
    guidance_per_image,
    tensor_inputs_of,
)
from .class_labels import ClassLabels
from .class_set import ClassSetMixin
from .conditions import Condition, ConditionEmbeds, ConditionSource, check_sequence_arguments, conditional_half
from .hooks import check_cache, has_hooked_parts, hooks_freed
from .reference_images import ReferenceImages, reference_latents
from .sequence import SequenceMixin


# float32 sigmas of a grid against the bounds of an interval.
SIGMA_TOLERANCE = 1e-5

# Schedulers whose custom sigmas are not those of the others: a list that ends with 0.
OWN_FORM_OF_SIGMAS = {"LTXEulerAncestralRFScheduler"}

# Index of the step, its timestep, and the tensors of the loop; to replacements for these.
StepCallback = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass
class TransDiffPipelineOutput(ImagePipelineOutput):
    """Generated images.

    Attributes:
        images: the B results, in the `output_type` asked for.
        intermediates: with `return_intermediates`, the images of every AR step, N times B of them; the last are
            the results.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    intermediates: list[list[Image.Image] | np.ndarray | torch.Tensor] | None = None


class TransDiffPipeline(
    TransDiffLoraLoaderMixin,
    TransDiffSingleFileMixin,
    TransDiffHubMixin,
    ClassSetMixin,
    SequenceMixin,
    DiffusionPipeline,
):
    """Class-conditional image generation with TransDiff (arXiv 2506.09482).

    Args:
        condition_encoder: class labels, and with MRAR the images made so far, to condition tokens.
        transformer: noisy latents, timestep and condition tokens to velocity.
        vae: latents, divided by its scaling factor, to pixels.
        scheduler: velocity to the next sample; any diffusers scheduler that integrates a flow serves.
        id2label: class id to name, or to comma-separated synonyms.
        guidance_scale: the checkpoint's recommended classifier-free guidance, one number or one for each image of
            the AR sequence; None is 1, no guidance.

    Raises:
        ValueError: the components do not belong together, or the scheduler does not predict flow.
    """

    model_cpu_offload_seq = "condition_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "condition"]

    def __init__(
        self,
        condition_encoder: ARConditionEncoder,
        transformer: TransDiffTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        guidance_scale: float | list | None = None,
    ):
        super().__init__()
        check_components(condition_encoder, transformer, vae)
        check_scheduler(scheduler)
        for module in (condition_encoder, transformer, vae):
            if module is not None:
                align_weights(module)
        self.register_modules(
            condition_encoder=condition_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        if id2label is not None:
            id2label = {int(class_id): name for class_id, name in id2label.items()}
        if guidance_scale is not None and condition_encoder is not None:
            guidance_per_image(guidance_scale, condition_encoder.num_images)
        self.register_to_config(id2label=id2label, guidance_scale=guidance_scale)

        self._set_labels(id2label)
        self.vae_scale_factor = VAE_DOWNSAMPLE_FACTOR if vae is None else vae_stride(vae.config)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

        # What callbacks may ask for while a call is running.
        self._guidance_scale = 1.0
        self._attention_kwargs = None
        self._num_timesteps = 0
        self._steps_taken, self._images_left = 0, 1
        self._current_timestep = None
        self._current_ar_step = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Guidance of the image being made."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the running call hands to the models' `attention_kwargs`."""
        return self._attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the image being made needs the unconditional branch."""
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the whole call, over all images of the sequence: callbacks count up to it.

        Where an edit takes fewer steps for its last image, that is known when the last image begins.
        """
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the step being taken; None outside the loop."""
        return self._current_timestep

    @property
    def current_ar_step(self) -> int | None:
        """Which image of the AR sequence is being made, 0..N-1; None outside the loop."""
        return self._current_ar_step

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to end the call with what is there."""
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of one name or a list of names.

        Raises:
            ValueError: a name is unknown (the nearest matches are named) or means several classes.
        """
        return [self._class_names.id_of(name) for name in ([label] if isinstance(label, str) else label)]

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, C, s, s)` in float32, drawn or taken from `latents` (of unit variance)."""
        shape = self._latents_shape(batch_size)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _latents_shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.transformer.config
        return (batch_size, config.in_channels, config.sample_size, config.sample_size)

    def denoise(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor,
        num_inference_steps: int,
        sigmas: Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        on_step_end: StepCallback | None = None,
        steps: range | None = None,
    ) -> torch.Tensor:
        """Noise `(B, C, s, s)` to clean latents: one run of the scheduler.

        Args:
            condition: `(B, M, D)`, or, for guidance, `(2 B, M, D)` with the unconditional branch first.
            on_step_end: called after each step with its index in the scheduler's timesteps, its timestep and the
                tensors of the loop; may return replacements for these.
            steps: the part of 0..num_inference_steps - 1 to take; `latents` have the σ of its first. All by default.
        """
        steps = range(num_inference_steps) if steps is None else steps
        timesteps = self._set_timesteps(num_inference_steps, sigmas, first_step=steps.start)
        # A scheduler of higher order has several timesteps a step.
        indices = range(len(timesteps))[steps.start * self.scheduler.order : steps.stop * self.scheduler.order]
        self._num_timesteps = self._steps_taken + len(indices) * self._images_left
        guided_steps = self._guided_steps(timesteps, guidance_interval)
        check_cache(self.transformer, guided_steps)
        projected = self._project_condition(condition)
        step_kwargs: dict[str, Any] = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        with self.progress_bar(total=len(steps)) as progress:
            # The bar of the sequence stays on the screen, those of its images come and go.
            progress.leave = self.condition_encoder.num_images == 1
            for i in indices:
                if self.interrupt:
                    break
                if i == indices[0] or guided_steps[i] != guided_steps[i - 1]:
                    # What a cache holds is of the image before, or of another batch.
                    self.transformer._reset_stateful_cache()
                self._current_timestep = timestep = timesteps[i]
                velocity = self._predict_velocity(latents, timestep, projected, guided_steps[i])
                latents = self.scheduler.step(velocity, timestep, latents, **step_kwargs, return_dict=False)[0]
                if on_step_end is not None:
                    replaced = on_step_end(i, timestep, {"latents": latents, "condition": condition})
                    latents = replaced.get("latents", latents).to(latents.dtype)
                    if "condition" in replaced:
                        condition = replaced["condition"]
                        projected = self._project_condition(condition)
                if i == indices[-1] or (i + 1) % self.scheduler.order == 0:
                    progress.update()
        self._steps_taken += len(indices)
        return latents

    def _project_condition(self, condition: torch.Tensor) -> Condition:
        """The condition as the transformer's cross-attention wants it: computed once, used at every step.

        Its keys and values, unless the transformer's blocks carry hooks: a cache may run a part of the batch, and
        offloading has no weights on the device outside the blocks' own calls.
        """
        if has_hooked_parts(self.transformer):
            return condition
        return self.transformer.project_condition(condition, attention_kwargs=self.attention_kwargs)

    def _predict_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, guided: bool
    ) -> torch.Tensor:
        """Guided velocity `(B, C, s, s)`, in the dtype of the latents."""
        model_input = latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(model_input, timestep)
        if guided:
            model_input = torch.cat([model_input, model_input])
        else:
            condition = conditional_half(condition, latents.shape[0])
        if isinstance(condition, torch.Tensor):
            timestep = timestep.expand(model_input.shape[0])  # FasterCache takes every tensor's conditional half
        with self.transformer.cache_context("denoise"):
            velocity = self.transformer(
                hidden_states=model_input.to(self.transformer.dtype),
                timestep=timestep,
                encoder_hidden_states=condition,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0].to(latents.dtype)
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + self.guidance_scale * (conditional - unconditional)
        return velocity

    def _guided_steps(self, timesteps: torch.Tensor, interval: tuple[float, float] | None) -> list[bool]:
        """Which steps need the unconditional branch: those whose σ lies in the interval, or all, or none."""
        if interval is None or not self.do_classifier_free_guidance:
            return [self.do_classifier_free_guidance] * len(timesteps)  # without a look at the device
        # Not from the timesteps, which some schedulers round. A float32 sigma of the grid may miss its own bound.
        low, high = interval[0] - SIGMA_TOLERANCE, interval[1] + SIGMA_TOLERANCE
        return [low <= sigma <= high for sigma in self.scheduler.sigmas[: len(timesteps)].tolist()]

    def _set_timesteps(
        self, num_inference_steps: int, sigmas: Sequence[float] | None, first_step: int = 0
    ) -> torch.Tensor:
        """Start the scheduler afresh: history and step index of the image before must not leak into this one."""
        device = self._execution_device
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first_step * self.scheduler.order)
        return self.scheduler.timesteps

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, H, W)` in [0, 1] to scaled latents `(B, C, s, s)` in float32.

        The posterior's mode, not a sample as in diffusers' own pipelines: it takes no random numbers, so a seed keeps
        its noise, and what an edit knows stays as near to the image as the VAE can.
        """
        pixels = (2 * pixels - 1).to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        return scale_latents(latents, self.vae.config)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Scaled latents `(B, C, s, s)` to images of the `output_type`; "latent" gives them back as they are."""
        if output_type == "latent":
            return latents
        latents = unscale_latents(latents, self.vae.config).to(self.vae.dtype)
        images = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | list[float] | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        return_intermediates: bool = False,
        sigmas: Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        timesteps: Sequence[float] | None = None,
        reference_images: ReferenceImages | None = None,
        num_ar_steps: int | None = None,
        condition_embeds: ConditionEmbeds | None = None,
        negative_condition_embeds: ConditionEmbeds | None = None,
    ) -> Any:
        """Generate images of the classes asked for.

        Args:
            class_labels: a class id or name, a list of either, or a LongTensor `(B,)`.
            guidance_scale: classifier-free guidance, v_u + g (v_c - v_u); one number, or one for each image of the
                AR sequence; 1 is no guidance; None takes the checkpoint's recommendation.
            num_inference_steps: denoising steps for each image of the AR sequence.
            generator: one torch generator, or one for each image.
            latents: initial noise `(B, C, s, s)` instead of a drawn one.
            output_type: "pil", "np" (NHWC in [0, 1]), "pt" (NCHW in [0, 1]) or "latent" (scaled, float32).
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step, with
                step in 0..N * num_inference_steps - 1; a returned dict replaces tensors.
            callback_on_step_end_tensor_inputs: which of "latents" and "condition" the callback gets.
            num_images_per_label: images of each label, next to one another in the result.
            return_intermediates: also return all N images of the MRAR sequence.
            sigmas: a time grid of your own, decreasing in (0, 1], where the scheduler takes one.
            guidance_interval: `(low, high)` in σ; outside it steps go without guidance and its second branch.
            attention_kwargs: `{"scale": s}` weighs the active LoRA adapters by s in this call.
            timesteps: `sigmas` in the transformer's unit, 1000 σ.
            reference_images: with MRAR, images that start the sequence in place of generated ones: a list of n for
                each label, see `reference_images.reference_latents` for what they may be; N - n images are made.
            num_ar_steps: stop after this image of the sequence, given ones counted; all N by default.
            condition_embeds: instead of labels, condition tokens `(B, M, D)` to decode one image from, any number of
                them; or a function that makes those of each image of the sequence, called with the images so far
                `(B, i, C, s, s)`, None for the first. See `encode_condition` and `blend_conditions`.
            negative_condition_embeds: the unconditional branch to these; by default that of the null class.

        Returns:
            `TransDiffPipelineOutput`, or a tuple of its entries without `return_dict`.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names it and the remedy.
        """
        check_scheduler(self.scheduler)
        check_guidance_interval(guidance_interval)
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_output(output_type, tensor_inputs, self._callback_tensor_inputs)
        check_count("num_images_per_label", num_images_per_label)
        sigmas = custom_sigmas(sigmas, timesteps, NUM_TRAIN_TIMESTEPS)
        num_inference_steps = self._check_steps(num_inference_steps, sigmas)
        check_sequence_arguments(class_labels, condition_embeds, negative_condition_embeds, reference_images)
        guidance_scales = self._resolve_guidance(guidance_scale, num_ar_steps, condition_embeds)
        source: ConditionSource
        with hooks_freed(self):
            if condition_embeds is None:
                source = self._label_condition(class_labels, num_images_per_label, guidance_scales)  # type: ignore[arg-type]
            else:
                embeds = (condition_embeds, negative_condition_embeds)
                source = self._given_condition(*embeds, num_images_per_label, guidance_scales, attention_kwargs)
            batch_size = source.batch_size
            check_latents(latents, self._latents_shape(batch_size))
            check_generator(generator, batch_size)
            references = None
            if reference_images is not None:
                num_labels = batch_size // num_images_per_label
                references = reference_latents(self, reference_images, num_labels, len(guidance_scales))
                references = references.repeat_interleave(num_images_per_label, dim=0)

            # One initial noise for all images of the sequence: only the condition and the steps' noise differ.
            noise = self.prepare_latents(batch_size, generator, latents)

            denoise = partial(
                self.denoise,
                noise,
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                guidance_interval=guidance_interval,
                generator=generator,
                on_step_end=self._step_callback(callback_on_step_end, tensor_inputs),
            )
            sequence = self._run_sequence(source, guidance_scales, denoise, attention_kwargs, references)

            images = self.decode_latents(sequence[-1], output_type)
            intermediates = None
            if return_intermediates:
                intermediates = [self.decode_latents(image, output_type) for image in sequence[:-1]] + [images]
        if not return_dict:
            return (images,) if intermediates is None else (images, intermediates)
        return TransDiffPipelineOutput(images=images, intermediates=intermediates)

    def _step_callback(
        self, callback: Callable[..., dict[str, Any] | None] | None, tensor_inputs: Sequence[str]
    ) -> StepCallback | None:
        """A user's `callback_on_step_end` as the loop calls it, with steps counted over the whole sequence."""
        if callback is None:
            return None
        steps = count()

        def on_step_end(_: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return callback(self, next(steps), timestep, {name: tensors[name] for name in tensor_inputs}) or {}

        return on_step_end

    def _check_steps(self, num_inference_steps: int, sigmas: Sequence[float] | None) -> int:
        """The number of steps, which a time grid of the caller's own decides."""
        if sigmas is None:
            check_count("num_inference_steps", num_inference_steps)
            return num_inference_steps
        reads_sigmas = "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters
        if not reads_sigmas or type(self.scheduler).__name__ in OWN_FORM_OF_SIGMAS:
            raise ValueError(f"{type(self.scheduler).__name__} takes no custom sigmas; pass num_inference_steps")
        return len(sigmas)
