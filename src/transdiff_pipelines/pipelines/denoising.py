"""The loop over denoising steps: guidance, the scheduler's steps, and what is computed once for all of them.

Shapes: B images, M condition tokens, D condition width, C latent channels, s latent side.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .call_state import CallStateMixin
from .checks import SCHEDULERS_READING_SIGMAS
from .conditions import Condition, conditional_half
from .hooks import check_cache, has_hooked_parts


# A σ of the grid may miss a bound of the interval by this much, because the grid is float32.
SIGMA_TOLERANCE = 1e-5

# Called with the index of a step, its timestep and the tensors of the loop; returns replacements for these.
StepCallback = Callable[[int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class DenoisingMixin(CallStateMixin):
    """From noise to clean latents under a condition: `denoise` and its parts."""

    progress_bar: Callable[..., Any]
    _execution_device: torch.device

    @property
    def _images_in_sequence(self) -> int:
        """N; without an encoder the only condition there can be is of one image."""
        return 1 if self.condition_encoder is None else self.condition_encoder.num_images

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
        call = self._call
        steps = range(num_inference_steps) if steps is None else steps
        timesteps = self._set_timesteps(num_inference_steps, sigmas, first_step=steps.start)
        # A scheduler of higher order has several timesteps a step.
        indices = range(len(timesteps))[steps.start * self.scheduler.order : steps.stop * self.scheduler.order]
        call.num_timesteps = call.steps_taken + len(indices) * call.images_left
        guided_steps = self._guided_steps(timesteps, guidance_interval)
        check_cache(self.transformer, guided_steps)
        projected = self._project_condition(condition)
        call.dtype = self.transformer.dtype
        # A sampler of flow maps says where each of its calls goes.
        next_timesteps = getattr(self.scheduler, "next_timesteps", None)
        step_kwargs: dict[str, Any] = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        with self.progress_bar(total=len(steps)) as progress:
            # In a sequence only the bar of the images stays on the screen; the bar of an image's steps goes with it.
            progress.leave = self._images_in_sequence == 1
            for i in indices:
                if call.interrupt:
                    break
                if i == indices[0] or guided_steps[i] != guided_steps[i - 1]:
                    # An approximating cache holds features of the image before, or, where guidance begins or ends,
                    # of a batch of another size: it must not hand them out for this step.
                    self.transformer._reset_stateful_cache()
                call.current_timestep = timestep = timesteps[i]
                next_timestep = None if next_timesteps is None else next_timesteps[i]
                velocity = self._predict_velocity(latents, timestep, projected, guided_steps[i], next_timestep)
                latents = self.scheduler.step(velocity, timestep, latents, **step_kwargs, return_dict=False)[0]
                if on_step_end is not None:
                    replaced = on_step_end(i, timestep, {"latents": latents, "condition": condition})
                    latents = replaced.get("latents", latents).to(latents.dtype)
                    if "condition" in replaced:
                        condition = replaced["condition"]
                        projected = self._project_condition(condition)
                if i == indices[-1] or (i + 1) % self.scheduler.order == 0:
                    progress.update()
        call.steps_taken += len(indices)
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
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        condition: Condition,
        guided: bool,
        next_timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Guided velocity `(B, C, s, s)`, of a flow map that to the next timestep, in the dtype of the latents."""
        model_input = latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(model_input, timestep)
        if guided:
            model_input = torch.cat([model_input, model_input])
        else:
            condition = conditional_half(condition, latents.shape[0])
        if isinstance(condition, torch.Tensor):
            timestep = timestep.expand(model_input.shape[0])  # FasterCache halves every tensor
        # The next time stays one for the batch: FasterCache does not know it, and leaves it as it is.
        going = {} if next_timestep is None else {"next_timestep": next_timestep}
        with self.transformer.cache_context("denoise"):
            velocity = self.transformer(
                hidden_states=model_input.to(self._call.dtype),
                timestep=timestep,
                encoder_hidden_states=condition,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                **going,
            )[0].to(latents.dtype)
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + self.guidance_scale * (conditional - unconditional)
        return velocity

    def _guided_steps(self, timesteps: torch.Tensor, interval: tuple[float, float] | None) -> list[bool]:
        """Which steps need the unconditional branch: those whose σ lies in the interval, or all, or none."""
        if interval is None or not self.do_classifier_free_guidance:
            return [self.do_classifier_free_guidance] * len(timesteps)  # reads no σ from the device
        # The σ are not computed from the timesteps, because some schedulers round these.
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
        if type(self.scheduler).__name__ in SCHEDULERS_READING_SIGMAS:
            self.scheduler.sigmas = self.scheduler.sigmas.cpu()
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first_step * self.scheduler.order)
        return self.scheduler.timesteps
