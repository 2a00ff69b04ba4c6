from .ar_condition_encoder import ARConditionEncoder, ARConditionEncoderOutput
from .transformer_transdiff import TransDiffTransformer2DModel


__all__ = ["ARConditionEncoder", "ARConditionEncoderOutput", "TransDiffTransformer2DModel"]
