"""diffusers' pipeline test mixins, of both styles, on the pipeline."""

import unittest

import torch
from diffusers import AutoencoderKL
from tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from tests.pipelines.test_pipelines_common import PipelineTesterMixin as UnittestPipelineTesterMixin
from tests.pipelines.testing_utils import (
    BasePipelineTesterConfig,
    FasterCacheTesterMixin,
    FirstBlockCacheTesterMixin,
    LoraMemoryTesterMixin,
    LoraTesterMixin,
    MagCacheTesterMixin,
    MemoryTesterMixin,
    PipelineTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
)

from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)


SHARED = {"sample_size": 8, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}


def components(patch_size: int, num_layers: int) -> dict:
    torch.manual_seed(0)
    encoder = ARConditionEncoder(
        num_classes=5, patch_size=patch_size, num_class_tokens=4, num_layers=num_layers, **SHARED
    )
    torch.manual_seed(0)
    transformer = TransDiffTransformer2DModel(cross_attention_dim=32, num_layers=num_layers, **SHARED)
    # As initialised the last linear is zero, and nothing could change the output.
    torch.nn.init.xavier_uniform_(transformer.proj_out.weight)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return {
        "condition_encoder": encoder.eval(),
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerMaruyamaScheduler(),
    }


class OneStepConfig(BasePipelineTesterConfig):
    pipeline_class = TransDiffPipeline
    required_input_params_in_call_signature = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    # Labels, not prompts: `num_images_per_label`.
    optional_input_params = BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    output_shape = (3, 16, 16)
    callback_cfg_params = frozenset()
    # What the LoRA mixin asks of components that it does not know.
    denoiser_target_modules = dict.fromkeys(["condition_encoder", "transformer"], ["to_q", "to_k", "to_v", "to_out.0"])

    def get_dummy_components(self, num_layers: int = 1) -> dict:
        return components(1, num_layers)

    def get_dummy_inputs(self) -> dict:
        return {
            "class_labels": 1,
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 1.5,
            "output_type": "pt",
        }


class MrarConfig(OneStepConfig):
    def get_dummy_components(self, num_layers: int = 1) -> dict:
        return components(2, num_layers)


class TestOneStep(OneStepConfig, PipelineTesterMixin):
    pass


class TestMrar(MrarConfig, PipelineTesterMixin):
    pass


class TestMemory(MrarConfig, MemoryTesterMixin):
    pass


class TestLora(OneStepConfig, LoraTesterMixin):
    pass


class TestLoraMemory(OneStepConfig, LoraMemoryTesterMixin):
    pass


class TestPyramidAttentionBroadcast(OneStepConfig, PyramidAttentionBroadcastTesterMixin):
    pass


class TestFasterCache(OneStepConfig, FasterCacheTesterMixin):
    # Images by default are videos there.
    FASTER_CACHE_CONFIG = {**FasterCacheTesterMixin.FASTER_CACHE_CONFIG, "tensor_format": "BCHW"}


class TestFirstBlockCache(OneStepConfig, FirstBlockCacheTesterMixin):
    pass


class TestTaylorSeerCache(OneStepConfig, TaylorSeerCacheTesterMixin):
    pass


class TestMagCache(OneStepConfig, MagCacheTesterMixin):
    pass


class UnittestPipelineTests(UnittestPipelineTesterMixin, unittest.TestCase):
    pipeline_class = TransDiffPipeline
    params = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    required_optional_params = UnittestPipelineTesterMixin.required_optional_params - {"num_images_per_prompt"}
    test_layerwise_casting = True
    test_save_load_optional_components = None  # it calls without them for images, which wants a VAE
    test_group_offloading = True

    def get_dummy_components(self, num_layers: int = 1) -> dict:
        return components(2, num_layers)

    def get_dummy_inputs(self, device, seed: int = 0) -> dict:
        return {
            "class_labels": 1,
            "generator": torch.Generator(device=device).manual_seed(seed),
            "num_inference_steps": 2,
            "output_type": "np",
        }
