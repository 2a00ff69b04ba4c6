"""From class labels to images: 1-step AR and Multi-Reference Autoregression (MRAR) in one loop.

A call is checked (`check_inputs`), gets its state (`CallState`), and then goes through the images of the AR sequence
(`_make_sequence`): each is conditioned on those before (`conditions.py`) and denoised (`denoising.py`).

Shapes: B images asked for, N images in an AR sequence (1 for 1-step AR), C latent channels, s latent side,
M condition tokens, D condition width.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from tqdm.auto import tqdm

from ..latents import NUM_TRAIN_TIMESTEPS, vae_stride
from ..loaders.hub import TransDiffHubMixin
from ..loaders.lora import TransDiffLoraLoaderMixin
from ..loaders.single_file import TransDiffSingleFileMixin
from ..models import ARConditionEncoder, TransDiffTransformer2DModel
from ..models.alignment import align_weights
from ..models.attention import check_attention_kwargs
from ..models.key_value_cache import KeyValueCache
from ..presets import DEFAULT_NUM_INFERENCE_STEPS
from .call_state import CallState
from .checks import (
    CallSettings,
    check_components,
    check_count,
    check_guidance_interval,
    check_output,
    check_present,
    check_scheduler,
    check_steps,
    custom_sigmas,
    guidance_per_image,
    resolve_guidance,
    tensor_inputs_of,
)
from .class_labels import ClassLabels, parse_class_labels
from .class_set import ClassSetMixin
from .conditions import (
    BoundEncoder,
    ConditionEmbeds,
    GivenCondition,
    LabelCondition,
    check_sequence_arguments,
)
from .denoising import DenoisingMixin, StepCallback
from .habits import check_no_others
from .image_latents import ImageLatentsMixin
from .reference_images import ReferenceImages
from .vae import vae_config


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
    ImageLatentsMixin,
    DenoisingMixin,
    DiffusionPipeline,
):
    """Class-conditional image generation with TransDiff (arXiv 2506.09482).

    Args:
        condition_encoder: class labels, and with MRAR the images made so far, to condition tokens.
        transformer: noisy latents, timestep and condition tokens to velocity.
        vae: latents, divided by its scaling factor, to pixels: an `AutoencoderKL`, or whatever has such a `decode`,
            for fast previews an `AutoencoderTiny`. Without one a call makes latents alone.
        scheduler: velocity to the next sample; any diffusers scheduler that integrates a flow serves.
        id2label: class id to name, or to comma-separated synonyms, for every class of the encoder; or a list of them.
            None takes the names that the encoder has from another pipeline, if it does.
        guidance_scale: the checkpoint's recommended classifier-free guidance, one number or one for each image of
            the AR sequence; None is that of another pipeline with this encoder, or else 1, no guidance.
        num_inference_steps: the checkpoint's recommended denoising steps for each image; None is that of another
            pipeline with this encoder, or else 100.

    Raises:
        ValueError: the components do not belong together, or the scheduler does not predict flow.
    """

    # What a call can do without; a pipeline saved without one loads again.
    _optional_components = ["condition_encoder", "vae"]
    model_cpu_offload_seq = "condition_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "condition"]

    def __init__(
        self,
        condition_encoder: ARConditionEncoder,
        transformer: TransDiffTransformer2DModel,
        vae: AutoencoderKL | ModelMixin | None,
        scheduler: SchedulerMixin,
        # diffusers warns of values that are not of these types, and JSON knows neither int keys nor float from int.
        id2label: dict | list | None = None,  # type: ignore[type-arg]
        guidance_scale: float | list | None = None,  # type: ignore[type-arg]
        num_inference_steps: int | None = None,
    ):
        super().__init__()
        check_components(condition_encoder, transformer, vae)
        check_scheduler(scheduler, transformer)
        for module in (condition_encoder, transformer, vae):
            if module is not None:
                align_weights(module)
        self.register_modules(
            condition_encoder=condition_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        if guidance_scale is not None and condition_encoder is not None:
            guidance_per_image(guidance_scale, condition_encoder.num_images)
        if num_inference_steps is not None:
            check_count("num_inference_steps", num_inference_steps)
        self._register_class_set(id2label, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps)

        self.vae_scale_factor = vae_stride(vae_config(vae))
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._last_call = CallState(scheduler)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """A pipeline of this class around the components of another one; `kwargs` take the place of some.

        diffusers leaves a VAE behind that is of none of the annotated classes itself, so it is passed on here.
        """
        passed = {"vae": getattr(pipeline, "vae", None)} | kwargs
        if getattr(kwargs.get("condition_encoder"), "_class_set", None) is not None:
            # An encoder that another pipeline had brings its own names and settings; those of `pipeline` are of its.
            passed = {"id2label": None, "guidance_scale": None, "num_inference_steps": None} | passed
        return super().from_pipe(pipeline, **passed)

    @property
    def recommended_num_inference_steps(self) -> int:
        """Denoising steps of a call that names none: the checkpoint's own, or else 100.

        What a flow map recommends are calls of its sampler; under any other it is a velocity model, which needs more.
        """
        recommended = self.config.num_inference_steps
        if self.transformer.config.num_flow_map_layers > 0 and not hasattr(self.scheduler, "next_timesteps"):
            recommended = None
        return recommended or DEFAULT_NUM_INFERENCE_STEPS

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of one name or a list of names.

        Raises:
            TypeError: a name is no str.
            ValueError: a name is unknown (the nearest matches are named) or means several classes.
        """
        names = label if isinstance(label, Iterable) and not isinstance(label, str) else [label]
        return [self._class_names.id_of(name) for name in names]

    @torch.no_grad()
    def encode_condition(
        self,
        class_labels: ClassLabels,
        reference_latents: torch.Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """Condition tokens `(B, M, D)` of labels and scaled latents `(B, n, C, s, s)` of earlier images.

        Labels have any form that a call accepts, one for each row of references or one for all; in a tensor of ids,
        `num_classes` is the null class, the unconditional branch of guidance. With a `cache` from
        `condition_encoder.new_cache()` a sequence is encoded group by group, see `ARConditionEncoder.forward`.
        """
        check_present(condition_encoder=self.condition_encoder)
        num_classes = self.condition_encoder.config.num_classes
        if not isinstance(class_labels, torch.Tensor):
            class_labels = torch.tensor(parse_class_labels(class_labels, self._class_names, num_classes))
        elif class_labels.device.type == "cpu":  # on a GPU, reading the ids would wait for it
            parse_class_labels(class_labels, self._class_names, num_classes + 1)
        class_labels = class_labels[None] if class_labels.ndim == 0 else class_labels
        class_labels = class_labels.to(self._execution_device)
        if reference_latents is not None:
            reference_latents = reference_latents.to(self._execution_device)
            if len(class_labels) == 1:
                class_labels = class_labels.expand(len(reference_latents))
        return self._bound_encoder()(class_labels, reference_latents, cache)

    def _bound_encoder(self) -> BoundEncoder:
        device, dtype = self._execution_device, self.transformer.dtype
        width = self.transformer.config.cross_attention_dim
        return BoundEncoder(self.condition_encoder, device, dtype, width, self.attention_kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | list[float] | None = None,
        num_inference_steps: int | None = None,
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
        **others: Any,
    ) -> Any:
        """Generate images of the classes asked for.

        Args:
            class_labels: a class id or name, a list of either, or a LongTensor `(B,)`.
            guidance_scale: classifier-free guidance, v_u + g (v_c - v_u); one number, or one for each image of the
                AR sequence; 1 is no guidance; None takes the checkpoint's recommendation.
            num_inference_steps: denoising steps for each image of the AR sequence; None takes the checkpoint's
                recommendation, or else 100.
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
                each label, see `reference_images.load_references` for what they may be; N - n images are made.
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
        check_no_others(self.__call__, others)
        settings = self.check_inputs(**self._arguments_to_check(locals()))
        with self._begin_call(settings) as call:
            source = self._condition_source(settings, condition_embeds, negative_condition_embeds)
            # All images of the sequence start from the same noise: only their condition and their steps' noise differ.
            noise = self.prepare_latents(source.batch_size, generator, latents)
            references = None
            if reference_images is not None:
                num_labels = source.batch_size // num_images_per_label
                references = self.encode_references(reference_images, num_labels, len(settings.guidance_scales))
                references = references.repeat_interleave(num_images_per_label, dim=0)
            on_step_end = self._step_callback(settings)

            def make_image(condition: torch.Tensor) -> torch.Tensor:
                return self.denoise(noise, condition, on_step_end=on_step_end, **settings.denoising)

            sequence = self._make_sequence(call, settings, source, make_image, references)
            images = self.decode_latents(sequence[-1], output_type)
            intermediates = None
            if return_intermediates:
                intermediates = [self.decode_latents(image, output_type) for image in sequence[:-1]] + [images]
        if not return_dict:
            return (images,) if intermediates is None else (images, intermediates)
        return TransDiffPipelineOutput(images=images, intermediates=intermediates)

    def _arguments_to_check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of a call's `locals()`, the arguments that `check_inputs` takes: every pipeline's call has most of them."""
        return {name: given[name] for name in inspect.signature(self.check_inputs).parameters if name in given}

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        guidance_scale: float | list[float] | None,
        num_inference_steps: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        num_images_per_label: int,
        sigmas: Sequence[float] | None,
        guidance_interval: tuple[float, float] | None,
        attention_kwargs: dict[str, Any] | None,
        timesteps: Sequence[float] | None,
        reference_images: ReferenceImages | None = None,
        num_ar_steps: int | None = None,
        condition_embeds: ConditionEmbeds | None = None,
        negative_condition_embeds: ConditionEmbeds | None = None,
    ) -> CallSettings:
        """Check the arguments of a call, before any work; the editing pipelines' too. See `__call__`.

        `prepare_latents` checks what depends on the size of the batch, which a function that makes the condition
        decides.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names it and the remedy.
        """
        needs_encoder = condition_embeds is None or callable(condition_embeds)
        self._check_components_of_call(needs_encoder, needs_vae=output_type != "latent")
        check_guidance_interval(guidance_interval)
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_output(output_type, tensor_inputs, self._callback_tensor_inputs)
        check_count("num_images_per_label", num_images_per_label)
        check_attention_kwargs(attention_kwargs)
        grid = custom_sigmas(sigmas, timesteps, NUM_TRAIN_TIMESTEPS)
        if num_inference_steps is None:
            num_inference_steps = self.recommended_num_inference_steps
        num_inference_steps = check_steps(self.scheduler, num_inference_steps, grid)
        self._check_attention_kwargs(attention_kwargs)
        check_sequence_arguments(class_labels, condition_embeds, negative_condition_embeds, reference_images)
        guidance_scales = resolve_guidance(
            guidance_scale,
            recommended=self.config.guidance_scale,
            num_images=self._images_in_sequence,
            num_ar_steps=num_ar_steps,
            single_condition=isinstance(condition_embeds, torch.Tensor),
        )
        if negative_condition_embeds is None and any(scale != 1.0 for scale in guidance_scales):
            check_present(condition_encoder=self.condition_encoder)  # it makes the unconditional branch
        label_ids = None
        if condition_embeds is None:
            num_classes = self.condition_encoder.config.num_classes
            label_ids = tuple(parse_class_labels(class_labels, self._class_names, num_classes))  # type: ignore[arg-type]
        return CallSettings(
            label_ids=label_ids,
            num_images_per_label=num_images_per_label,
            guidance_scales=guidance_scales,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            sigmas=None if grid is None else tuple(grid),
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            tensor_inputs=tuple(tensor_inputs),
            attention_kwargs=attention_kwargs,
        )

    def _check_components_of_call(self, needs_encoder: bool, needs_vae: bool) -> None:
        check_present(transformer=self.transformer, scheduler=self.scheduler)
        if needs_encoder:
            check_present(condition_encoder=self.condition_encoder)
        if needs_vae:
            check_present(vae=self.vae)
        # Anything may have been put into the place of a component since the pipeline was made.
        check_components(self.condition_encoder, self.transformer, self.vae)
        check_scheduler(self.scheduler, self.transformer)

    def _condition_source(
        self,
        settings: CallSettings,
        condition_embeds: ConditionEmbeds | None,
        negative_condition_embeds: ConditionEmbeds | None,
    ) -> LabelCondition | GivenCondition:
        encode, copies = self._bound_encoder(), settings.num_images_per_label
        if condition_embeds is not None:
            return GivenCondition(encode, condition_embeds, negative_condition_embeds, settings.guided, copies)
        labels = [label for label in settings.label_ids or () for _ in range(copies)]
        return LabelCondition(encode, labels, settings.guided, len(settings.guidance_scales))

    def _make_sequence(
        self,
        call: CallState,
        settings: CallSettings,
        source: LabelCondition | GivenCondition,
        make_image: Callable[[torch.Tensor], torch.Tensor],
        references: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The AR loop: latents of the images after the references `(B, n, C, s, s)`, each made from its condition."""
        num_images, num_references = len(settings.guidance_scales), 0 if references is None else references.shape[1]
        call.images_left = num_images - num_references
        sequence: list[torch.Tensor] = []
        unseen = references
        with self._sequence_progress(call.images_left) as progress:
            for ar_step in range(num_references, num_images):
                call.current_ar_step = ar_step
                scale = settings.guidance_scales[ar_step]
                if ar_step == num_references or scale != settings.guidance_scales[ar_step - 1]:
                    # Otherwise the scale stays, because a callback may have changed it for all images that share it.
                    call.guidance_scale = scale
                condition = source.extend(unseen)
                sequence.append(make_image(condition))
                unseen = sequence[-1].unsqueeze(1)
                call.images_left -= 1
                progress.update()
                if call.interrupt:
                    break
        return sequence

    def _sequence_progress(self, num_images: int) -> Any:
        """Progress over the images of an AR sequence; a single image needs no bar beside that of its steps."""
        if num_images == 1:
            return tqdm(disable=True)
        progress = self.progress_bar(total=num_images)
        progress.set_description("images of the sequence")
        return progress

    def _step_callback(self, settings: CallSettings) -> StepCallback | None:
        """A user's `callback_on_step_end` as the loop calls it, with steps counted over the whole sequence."""
        callback = settings.callback_on_step_end
        if callback is None:
            return None
        steps = count()

        def on_step_end(_: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            given = {name: tensors[name] for name in settings.tensor_inputs}
            replaced = callback(self, next(steps), timestep, given)
            if replaced is not None and not isinstance(replaced, Mapping):
                raise TypeError(
                    f"callback_on_step_end returned a {type(replaced).__name__}; expected a dict of replaced tensors, "
                    "such as {'latents': latents}, or None"
                )
            return dict(replaced or {})

        return on_step_end
