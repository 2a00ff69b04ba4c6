"""diffusers' attention surface on both models: processors, backends, fused projections."""

import pytest
import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from rounding import assert_close
from tiny import seeded, tiny_encoder, tiny_transformer

from transdiff_pipelines.models.attention import TransDiffAttnProcessor


def encode(model):
    references = torch.randn(2, 1, 4, 4, 4, generator=seeded())
    return model(torch.tensor([1, 4]), references, return_dict=False)[0]


def denoise(model):
    x, condition = torch.randn(2, 4, 4, 4, generator=seeded()), torch.randn(2, 8, 16, generator=seeded(1))
    return model(x, 500.0, condition, return_dict=False)[0]


@pytest.fixture(autouse=True)
def same_backend_afterwards(monkeypatch):
    """Setting a model's backend makes it diffusers' current one as well."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture(params=[(tiny_encoder, encode), (tiny_transformer, denoise)], ids=["encoder", "transformer"])
def model_and_call(request):
    make, call = request.param
    with torch.no_grad():
        yield make(), call


class CountingProcessor(TransDiffAttnProcessor):
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def test_processors_are_listed_and_replaced(model_and_call):
    model, call = model_and_call
    expected = call(model)
    assert all(isinstance(processor, TransDiffAttnProcessor) for processor in model.attn_processors.values())
    CountingProcessor.calls = 0
    model.set_attn_processor(CountingProcessor())
    assert torch.equal(call(model), expected)
    assert CountingProcessor.calls == len(model.attn_processors) > 0
    model.set_attn_processor({name: TransDiffAttnProcessor() for name in model.attn_processors})
    call(model)
    assert CountingProcessor.calls == len(model.attn_processors)


def test_backend_of_a_model(model_and_call, monkeypatch):
    model, call = model_and_call
    expected = call(model)
    used = []
    kernel = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def spy(**kwargs):
        used.append(kwargs["query"].shape)
        return kernel(**kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, spy)
    model.set_attention_backend("_native_math")
    assert_close(call(model), expected)
    assert len(used) == len(model.attn_processors)
    # (B, S, H, E), as every backend wants it
    assert all(shape[0] == 2 and tuple(shape[2:]) == (2, 8) for shape in used)


def test_backend_of_a_context(model_and_call):
    model, call = model_and_call
    expected = call(model)
    with attention_backend("_native_math"):
        assert_close(call(model), expected)


def test_unknown_backend(model_and_call):
    with pytest.raises(ValueError, match="backend"):
        model_and_call[0].set_attention_backend("abacus")
