from .condition_blending import blend_conditions
from .conversion import convert_original_checkpoint
from .outpainting import pad_for_outpainting
from .pipeline_transdiff import TransDiffPipeline, TransDiffPipelineOutput
from .pipeline_transdiff_img2img import TransDiffImg2ImgPipeline
from .pipeline_transdiff_inpaint import TransDiffInpaintPipeline


__all__ = [
    "TransDiffImg2ImgPipeline",
    "TransDiffInpaintPipeline",
    "TransDiffPipeline",
    "TransDiffPipelineOutput",
    "blend_conditions",
    "convert_original_checkpoint",
    "pad_for_outpainting",
]
