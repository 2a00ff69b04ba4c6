"""Image-to-image: change an image instead of making one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput

from .class_labels import ClassLabels
from .editing import References, TransDiffEditingPipeline
from .habits import check_no_others
from .pipeline_transdiff import TransDiffPipelineOutput


class TransDiffImg2ImgPipeline(TransDiffEditingPipeline):
    """Make an image one of another class, or another one of its class, with the weights of `TransDiffPipeline`.

    Any TransDiff folder loads, and `TransDiffImg2ImgPipeline.from_pipe(pipe)` shares the components of a pipeline
    that is there; for arguments and errors of the constructor see `TransDiffPipeline`.

    With MRAR the edit is the last image of the AR sequence; see `references` for those before.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: PipelineImageInput | None = None,
        class_labels: ClassLabels | None = None,
        strength: float = 0.6,
        guidance_scale: float | list[float] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        sigmas: Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        timesteps: Sequence[float] | None = None,
        references: References = "generated",
        **others: Any,
    ) -> Any:
        """Noise images to the σ that `strength` names and denoise them under a class.

        Args:
            image: PIL images (RGB), arrays `(B, H, W, 3)` or tensors `(B, 3, H, W)` in [0, 1], of the model's size;
                or scaled latents `(B, C, s, s)`, which are not encoded again. One for all labels, or one for each.
            class_labels: what the images shall become; one for all images, or one for each.
            strength: in [0, 1], the part of the steps that is taken. 0 takes none and gives the image as the VAE
                has it; 1 is `TransDiffPipeline` from the same noise and does not see the image.
            num_inference_steps: steps of the whole grid, of which `strength` takes the last; None takes the
                checkpoint's recommendation, or else 100.
            latents: noise `(B, C, s, s)` instead of a drawn one.
            references: what the images before the last of an MRAR sequence are. "generated" from noise, as in plain
                generation; "edited", each from the given image as the last one is; "image", the given image itself,
                which then is a reference at every strength. All the same to a 1-step model.

        Returns:
            `TransDiffPipelineOutput`, or a tuple with its images without `return_dict`.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names it and the remedy.

        The other arguments are those of `TransDiffPipeline.__call__`.
        """
        check_no_others(self.__call__, others)
        settings = self.check_inputs(**self._arguments_to_check(locals()))
        inputs = self._check_edit(settings, image, strength, references)
        images = self._edit(settings, inputs, references)
        return TransDiffPipelineOutput(images=images) if return_dict else (images,)
