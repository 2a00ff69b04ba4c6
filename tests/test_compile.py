"""torch.compile: no graph breaks, and nothing compiled again from one step, image or guidance value to the next.

Compiled with backend "eager": tracing, guards and recompilation are torch.compile's own, without waiting for kernels.
"""

import pytest
import torch
from rounding import assert_close
from tiny import seeded, tiny_encoder, tiny_pipeline, tiny_transformer
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    """Graphs compiled so far; a recompilation adds one."""
    return counters["stats"]["unique_graphs"]


def encoder_inputs():
    return {
        "class_labels": torch.tensor([1, 4]),
        "reference_latents": torch.randn(2, 2, 4, 4, 4, generator=seeded()),
    }


def transformer_inputs():
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=seeded()),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=seeded(1)),
    }


@pytest.mark.parametrize(("make", "inputs"), [(tiny_encoder, encoder_inputs), (tiny_transformer, transformer_inputs)])
class TestModels:
    def test_repeated_blocks_share_one_graph_without_breaks(self, make, inputs):
        model = make()
        with torch.no_grad():
            expected = model(**inputs(), return_dict=False)[0]
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            assert_close(model(**inputs(), return_dict=False)[0], expected)
        assert len(model.transformer_blocks) > 1
        assert num_graphs() == 1

    def test_whole_model_without_breaks(self, make, inputs):
        model = make()
        with torch.no_grad():
            expected = model(**inputs(), return_dict=False)[0]
            model.compile(fullgraph=True, backend="eager")
            assert_close(model(**inputs(), return_dict=False)[0], expected)
        assert num_graphs() == 1


class TestPipeline:
    def compiled(self, patch_size):
        pipe = tiny_pipeline(
            patch_size,
            condition_encoder=tiny_encoder(patch_size, num_layers=1),
            transformer=tiny_transformer(num_layers=1),
        )
        expected = self.run(pipe)
        for model in (pipe.condition_encoder, pipe.transformer):
            model.compile(backend="eager", fullgraph=True)
        return pipe, expected

    def run(self, pipe, labels=(1, 4), steps=3, guidance_scale=1.3):
        return pipe(
            list(labels),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=seeded(),
            output_type="latent",
        ).images

    def test_multi_reference_autoregression(self):
        """The encoder is compiled for a first image and for a later one, the decoder for M tokens and for any."""
        pipe, expected = self.compiled(patch_size=2)
        assert_close(self.run(pipe), expected)
        assert num_graphs() <= 2 + 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(self.run(pipe), expected)
            self.run(pipe, guidance_scale=1.9)
            self.run(pipe, guidance_scale=[1.2, 1.4, 1.6, 1.8])
            self.run(pipe, steps=5)
            self.run(pipe, labels=(0, 0))  # fewer labels to encode for the same batch

    @pytest.mark.slow
    def test_default_backend(self):
        """The kernels that inductor makes, which needs a C++ compiler."""
        pipe = tiny_pipeline(1)
        expected = self.run(pipe)
        for model in (pipe.condition_encoder, pipe.transformer):
            model.compile_repeated_blocks(fullgraph=True)
        assert_close(self.run(pipe), expected)
