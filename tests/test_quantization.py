"""Quantised models: torchao int8 through diffusers' configs, at a known error, saved and loaded again."""

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import TransDiffPipeline


quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing: make test-quantization")


def run(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 4], num_inference_steps=3, generator=seeded(), output_type="latent").images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights(dtype, tmp_path):
    exact = tiny_pipeline()
    exact.save_pretrained(tmp_path / "exact")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pipe = TransDiffPipeline.from_pretrained(
        tmp_path / "exact",
        quantization_config=PipelineQuantizationConfig(
            quant_mapping={"condition_encoder": config, "transformer": config}
        ),
        dtype=dtype,
    )
    for model in (pipe.condition_encoder, pipe.transformer):
        assert model.is_quantized
        assert type(model.transformer_blocks[0].ff.net[2].weight).__name__ == "Int8Tensor"
    expected, images = run(exact), run(pipe)
    error = ((images - expected).norm() / expected.norm()).item()
    print(f"int8 weights, {dtype}: relative error {error:.4f}")
    assert 0 < error < 0.1

    pipe.save_pretrained(tmp_path / "int8")
    again = TransDiffPipeline.from_pretrained(tmp_path / "int8", dtype=dtype)
    assert again.transformer.is_quantized
    assert torch.equal(run(again), images)
