from .pipeline_transdiff import TransDiffPipeline, TransDiffPipelineOutput


__all__ = ["TransDiffPipeline", "TransDiffPipelineOutput"]
