"""Inpainting: keep a part of an image, generate the rest; on a padded canvas, outpainting."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput

from .class_labels import ClassLabels
from .editing import References, TransDiffEditingPipeline
from .habits import check_no_others
from .pipeline_transdiff import TransDiffPipelineOutput


class TransDiffInpaintPipeline(TransDiffEditingPipeline):
    """Repaint the white pixels of a mask under a class, with the weights of `TransDiffPipeline`.

    At every step the latents of the black pixels are put back, noised to the step's σ; at the end the image's own
    pixels are. Any TransDiff folder loads, and `TransDiffInpaintPipeline.from_pipe(pipe)` shares the components of a
    pipeline that is there; for arguments and errors of the constructor see `TransDiffPipeline`.

    With MRAR the edit is the last image of the AR sequence; see `references` for those before.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        class_labels: ClassLabels | None = None,
        strength: float = 1.0,
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
        jump_length: int = 10,
        jump_n_sample: int = 1,
        **others: Any,
    ) -> Any:
        """Generate what a mask shows white, so that it fits the rest.

        Args:
            image: PIL images (RGB), arrays `(B, H, W, 3)` or tensors `(B, 3, H, W)` in [0, 1], of the model's size;
                or scaled latents `(B, C, s, s)`, which are neither encoded nor composited. One for all, or one each.
            mask_image: PIL images, arrays or tensors `(B, H, W)` in [0, 1] of the image's size: white (1) is
                repainted, black (0) kept exactly, and between the two are blended, as after
                `pipe.mask_processor.blur(mask_image, blur_factor)`. A latent is repainted if a pixel of it is at 0.5
                or above. All black gives the image back; all white is image-to-image at this `strength`.
            class_labels: what the images show; one for all images, or one for each.
            strength: in [0, 1], the part of the steps that is taken. 1 generates the unknown part from noise; below,
                it starts from what the image has there; at 0 it is the image as the VAE has it.
            num_inference_steps: steps of the whole grid, of which `strength` takes the last; None takes the
                checkpoint's recommendation, or else 100.
            latents: noise `(B, C, s, s)` instead of a drawn one.
            output_type: as in `TransDiffPipeline`; "latent" is not composited.
            references: what the images before the last of an MRAR sequence are. "generated" from noise, as in plain
                generation; "edited", each is inpainted as the last one is; "image", the given image itself, masked
                part and all. All the same to a 1-step model.
            jump_length: how many steps a jump back of RePaint undoes.
            jump_n_sample: how often each block of `jump_length` steps is taken, so that known and unknown part can
                agree; 1 goes straight through.

        Returns:
            `TransDiffPipelineOutput`, or a tuple with its images without `return_dict`.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names it and the remedy.

        The other arguments are those of `TransDiffPipeline.__call__`.
        """
        check_no_others(self.__call__, others)
        settings = self.check_inputs(**self._arguments_to_check(locals()))
        mask = self._preprocess_mask(mask_image)
        inputs = self._check_edit(settings, image, strength, references, mask, jump_length, jump_n_sample)
        images = self._edit(settings, inputs, references)
        return TransDiffPipelineOutput(images=images) if return_dict else (images,)
