"""An AR sequence of images: what each is conditioned on, and the loop that makes one after the other.

Shapes: B images asked for, N images in an AR sequence (1 for 1-step AR), C latent channels, s latent side, M condition
tokens, D condition width.
"""

from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from ..models.key_value_cache import KeyValueCache
from .checks import check_ar_steps, guidance_per_image
from .class_labels import ClassLabels, parse_class_labels
from .conditions import ConditionEmbeds, ConditionSource, GivenCondition, SequenceCondition


class SequenceMixin:
    """The part of `TransDiffPipeline` that encodes conditions and goes from image to image."""

    condition_encoder: Any
    transformer: Any
    config: Any
    progress_bar: Any
    _class_names: Any
    _execution_device: torch.device
    attention_kwargs: Any
    interrupt: Any
    _attention_kwargs: dict[str, Any] | None
    _current_ar_step: int | None
    _current_timestep: torch.Tensor | None

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
        num_classes = self.condition_encoder.config.num_classes
        if not isinstance(class_labels, torch.Tensor):
            class_labels = torch.tensor(parse_class_labels(class_labels, self._class_names, num_classes))
        elif class_labels.device.type == "cpu":  # elsewhere a look at the ids would wait for the device
            parse_class_labels(class_labels, self._class_names, num_classes + 1)
        class_labels = class_labels[None] if class_labels.ndim == 0 else class_labels
        class_labels = class_labels.to(self._execution_device)
        if reference_latents is not None:
            reference_latents = reference_latents.to(self._execution_device)
            if len(class_labels) == 1:
                class_labels = class_labels.expand(len(reference_latents))
        condition = self.condition_encoder(
            class_labels,
            reference_latents,
            attention_kwargs=self.attention_kwargs,
            cache=cache,
            return_dict=False,
        )[0]
        return condition.to(self.transformer.dtype)

    def _resolve_guidance(
        self,
        guidance_scale: float | list[float] | None,
        num_ar_steps: int | None = None,
        condition_embeds: ConditionEmbeds | None = None,
    ) -> list[float]:
        """Guidance of each image of the sequence that ends with image `num_ar_steps`; of one for a given condition."""
        num_images = self.condition_encoder.num_images
        default = 1.0 if self.config.guidance_scale is None else self.config.guidance_scale
        if isinstance(condition_embeds, torch.Tensor):
            # One decode, of whatever the tokens hold: like the last image of a sequence.
            default, num_images = guidance_per_image(default, num_images)[-1], 1
        scales = guidance_per_image(default if guidance_scale is None else guidance_scale, num_images)
        return scales[: check_ar_steps(num_ar_steps, num_images)]

    def _make_sequence(
        self,
        label_ids: list[int],
        guidance_scales: list[float],
        make_image: Callable[[torch.Tensor], torch.Tensor],
        attention_kwargs: dict[str, Any] | None = None,
    ) -> list[torch.Tensor]:
        """Latents of all images of B AR sequences, each made by `make_image` under the condition of those before."""
        source = self._label_condition(label_ids, 1, guidance_scales)
        return self._run_sequence(source, guidance_scales, make_image, attention_kwargs)

    def _label_condition(
        self, class_labels: ClassLabels, num_images_per_label: int, guidance_scales: list[float]
    ) -> SequenceCondition:
        encoder = self.condition_encoder
        labels = parse_class_labels(class_labels, self._class_names, encoder.config.num_classes)
        labels = [label for label in labels for _ in range(num_images_per_label)]
        guided = any(scale != 1.0 for scale in guidance_scales)
        return SequenceCondition(self.encode_condition, encoder, labels, guided, self._execution_device)

    def _given_condition(
        self,
        condition_embeds: ConditionEmbeds,
        negative_condition_embeds: ConditionEmbeds | None,
        num_images_per_label: int,
        guidance_scales: list[float],
        attention_kwargs: dict[str, Any] | None,
    ) -> GivenCondition:
        self._attention_kwargs = attention_kwargs  # what the caller's function encodes is weighed like the rest
        try:
            return GivenCondition(
                condition_embeds,
                negative_condition_embeds,
                self.encode_condition,
                self.condition_encoder,
                guided=any(scale != 1.0 for scale in guidance_scales),
                repeats=num_images_per_label,
                device=self._execution_device,
                dtype=self.transformer.dtype,
            )
        finally:
            self._attention_kwargs = None

    def _run_sequence(
        self,
        source: ConditionSource,
        guidance_scales: list[float],
        make_image: Callable[[torch.Tensor], torch.Tensor],
        attention_kwargs: dict[str, Any] | None = None,
        references: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Latents of the images made after the references `(B, n, C, s, s)`, `len(guidance_scales) - n` of them."""
        num_references = 0 if references is None else references.shape[1]
        sequence: list[torch.Tensor] = []
        self._steps_taken, self._images_left = 0, len(guidance_scales) - num_references
        self._interrupt, self._attention_kwargs = False, attention_kwargs
        try:
            with self._sequence_progress(self._images_left) as progress:
                condition, unseen = source.extend(), references
                for ar_step in range(num_references, len(guidance_scales)):
                    self._current_ar_step = ar_step
                    if ar_step == num_references or guidance_scales[ar_step] != guidance_scales[ar_step - 1]:
                        # What a callback made of the scale holds until an image has another one.
                        self._guidance_scale = guidance_scales[ar_step]
                    if unseen is not None:
                        condition = source.extend(unseen)
                    if ar_step == len(guidance_scales) - 1:
                        source.finish()
                    sequence.append(make_image(condition))
                    unseen = sequence[-1].unsqueeze(1)
                    self._images_left -= 1
                    progress.update()
                    if self.interrupt:
                        break
        finally:
            # Nothing of a call is left behind, however it ends.
            self._current_ar_step = self._current_timestep = self._attention_kwargs = None
        return sequence

    def _sequence_progress(self, num_images: int) -> Any:
        """Progress over the images of an AR sequence; a single image needs no bar beside that of its steps."""
        if num_images == 1:
            return tqdm(disable=True)
        progress = self.progress_bar(total=num_images)
        progress.set_description("images of the sequence")
        return progress
