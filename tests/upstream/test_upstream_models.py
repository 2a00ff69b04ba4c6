"""diffusers' model test mixins, of both styles, on the condition encoder and the decoder."""

import unittest

import pytest
import torch
from tests.models import test_modeling_common
from tests.models.testing_utils import (
    AttentionBackendTesterMixin,
    AttentionTesterMixin,
    BaseModelTesterConfig,
    FasterCacheTesterMixin,
    FirstBlockCacheTesterMixin,
    LoraHotSwappingForModelTesterMixin,
    LoraTesterMixin,
    MagCacheTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
    TorchAoTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import torch_device

from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel


# The paper's last linear starts at zero, and everything behind a zero is the same. The mixins compare outputs.
_initialize_weights = TransDiffTransformer2DModel.initialize_weights


def _initialize_every_weight(model: TransDiffTransformer2DModel) -> None:
    _initialize_weights(model)
    torch.nn.init.xavier_uniform_(model.proj_out.weight)


TransDiffTransformer2DModel.initialize_weights = _initialize_every_weight

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch_device, dtype)


class TransformerConfig(BaseModelTesterConfig):
    model_class = TransDiffTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = input_shape = (4, 8, 8)
    model_split_percents = [0.7, 0.7, 0.9]
    uses_custom_attn_processor = True

    def get_init_dict(self) -> dict:
        # Without dropout: the mixins compare forwards in training mode.
        return {"sample_size": 8, "in_channels": 4, "cross_attention_dim": 32, "dropout": 0.0, **SIZES}

    def get_dummy_inputs(self, batch_size: int = 2, **_) -> dict:
        return {
            "hidden_states": noise(batch_size, 4, 8, 8, dtype=self.torch_dtype),
            "timestep": torch.full((batch_size,), 500.0, device=torch_device),
            "encoder_hidden_states": noise(batch_size, 16, 32, seed=1, dtype=self.torch_dtype),
        }


class EncoderConfig(BaseModelTesterConfig):
    model_class = ARConditionEncoder
    main_input_name = "reference_latents"
    output_shape = (12, 32)
    input_shape = (2, 4, 4, 4)
    model_split_percents = [0.7, 0.7, 0.9]
    uses_custom_attn_processor = True

    def get_init_dict(self) -> dict:
        return {
            "num_classes": 5,
            "sample_size": 4,
            "in_channels": 4,
            "patch_size": 2,
            "num_class_tokens": 4,
            "dropout": 0.0,
            **SIZES,
        }

    def get_dummy_inputs(self, batch_size: int = 2, **_) -> dict:
        return {
            "class_labels": torch.arange(batch_size, device=torch_device),
            "reference_latents": noise(batch_size, 2, 4, 4, 4, dtype=self.torch_dtype),
        }


class TestTransformer(TransformerConfig, ModelTesterMixin):
    pass


class TestEncoder(EncoderConfig, ModelTesterMixin):
    pass


class TestTransformerMemory(TransformerConfig, MemoryTesterMixin):
    pass


class TestEncoderMemory(EncoderConfig, MemoryTesterMixin):
    pass


class TestTransformerTraining(TransformerConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"TransDiffTransformer2DModel"})


class TestEncoderTraining(EncoderConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"ARConditionEncoder"})


class TestTransformerAttention(TransformerConfig, AttentionTesterMixin):
    pass


class TestEncoderAttention(EncoderConfig, AttentionTesterMixin):
    pass


class TestTransformerAttentionBackend(TransformerConfig, AttentionBackendTesterMixin):
    pass


class TestEncoderAttentionBackend(EncoderConfig, AttentionBackendTesterMixin):
    pass


class TestTransformerLora(TransformerConfig, LoraTesterMixin):
    pass


class TestEncoderLora(EncoderConfig, LoraTesterMixin):
    pass


class TestTransformerLoraHotSwapping(TransformerConfig, LoraHotSwappingForModelTesterMixin):
    pass


class TestTransformerCompile(TransformerConfig, TorchCompileTesterMixin):
    pass


class TestEncoderCompile(EncoderConfig, TorchCompileTesterMixin):
    pass


class TestTransformerTorchAo(TransformerConfig, TorchAoTesterMixin):
    pass


class TestTransformerPyramidAttentionBroadcast(TransformerConfig, PyramidAttentionBroadcastTesterMixin):
    pass


class TestTransformerFasterCache(TransformerConfig, FasterCacheTesterMixin):
    pass


class TestTransformerFirstBlockCache(TransformerConfig, FirstBlockCacheTesterMixin):
    pass


class TestTransformerMagCache(TransformerConfig, MagCacheTesterMixin):
    pass


class TestTransformerTaylorSeerCache(TransformerConfig, TaylorSeerCacheTesterMixin):
    # Lite mode finds the blocks by themselves; the default patterns know attention named `attn` only.
    TAYLORSEER_CACHE_CONFIG = {**TaylorSeerCacheTesterMixin.TAYLORSEER_CACHE_CONFIG, "use_lite_mode": True}


if hasattr(test_modeling_common, "ModelTesterMixin"):  # gone from newer checkouts, in favour of the above

    class UnittestStyle(test_modeling_common.ModelTesterMixin):
        """The older mixin asks for the same in other words."""

        @property
        def dummy_input(self) -> dict:
            return self.get_dummy_inputs()

        def prepare_init_args_and_inputs_for_common(self) -> tuple[dict, dict]:
            return self.get_init_dict(), self.get_dummy_inputs()

        def test_gradient_checkpointing_is_applied(self):
            super().test_gradient_checkpointing_is_applied(expected_set={self.model_class.__name__})

    class TransformerUnittests(TransformerConfig, UnittestStyle, unittest.TestCase):
        pass

    class EncoderUnittests(EncoderConfig, UnittestStyle, unittest.TestCase):
        pass


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)
