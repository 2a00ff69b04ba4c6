from .ar_condition_encoder import ARConditionEncoder, ARConditionEncoderOutput
from .transdiff_transformer_2d import TransDiffTransformer2DModel


__all__ = ["ARConditionEncoder", "ARConditionEncoderOutput", "TransDiffTransformer2DModel"]
