"""Fusing, weighing and deleting adapters: what is put into the weights is what is taken out of them again."""

from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import randomize, seeded, tiny_pipeline
from torch import nn

from transdiff_pipelines import TransDiffPipeline


def adapted(*names: str, component: str = "transformer") -> TransDiffPipeline:
    pipe = tiny_pipeline()
    model = getattr(pipe, component)
    for seed, name in enumerate(names):
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]), name)
        for key, layer in model.named_modules():
            if key.endswith(f".{name}") and ".lora_" in key:
                randomize(layer, seed, std=0.3)
    pipe.set_adapters(list(names))
    return pipe


def weights(pipe) -> dict[str, torch.Tensor]:
    state = pipe.transformer.state_dict()
    return {name: value.clone() for name, value in state.items() if ".lora_" not in name}


def scalings(pipe) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in pipe.transformer.modules() if hasattr(layer, "scaling")]


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Already following adapters were merged")
class TestFusing:
    @pytest.mark.parametrize("by", ["pipeline", "model"])
    def test_unfusing_gives_weights_and_scale_back(self, by):
        pipe = adapted("a", "b")
        before, scales = weights(pipe), scalings(pipe)
        target = pipe if by == "pipeline" else pipe.transformer
        target.fuse_lora(lora_scale=0.5, adapter_names=["a"])
        target.fuse_lora(lora_scale=0.5, adapter_names=["b"])
        target.fuse_lora(lora_scale=0.5)  # all are in already
        target.unfuse_lora()
        for name, value in weights(pipe).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-5)
        assert scalings(pipe) == scales

    def test_a_scale_is_that_of_the_weights(self):
        pipe = adapted("a")
        pipe.set_adapters("a", 0.5)
        arguments = {"class_labels": 1, "num_inference_steps": 2, "output_type": "latent"}
        wanted = pipe(**arguments, generator=seeded()).images
        pipe.set_adapters("a", 1.0)
        pipe.fuse_lora(lora_scale=0.5)
        torch.testing.assert_close(pipe(**arguments, generator=seeded()).images, wanted, rtol=0, atol=1e-3)

    def test_a_failure_leaves_the_weights(self):
        pipe = adapted("a", "b")
        pipe.fuse_lora(adapter_names=["a"])
        before, scales = weights(pipe), scalings(pipe)
        factors = [value for name, value in pipe.transformer.named_parameters() if "lora_B.b." in name]
        factors[-1].data.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaNs detected"):
            pipe.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["b"])
        for name, value in weights(pipe).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-5)
        assert scalings(pipe) == scales

    @pytest.mark.parametrize(
        "change", [lambda pipe: pipe.set_adapters("a", 0.3), lambda pipe: pipe.delete_adapters("a")]
    )
    @pytest.mark.parametrize("by", ["pipeline", "model"])
    def test_a_fused_adapter_cannot_be_changed(self, change, by):
        pipe = adapted("a")
        before = weights(pipe)
        pipe.fuse_lora()
        with pytest.raises(ValueError, match=r"\['a'\] are fused .* call unfuse_lora\(\) first"):
            change(pipe if by == "pipeline" else pipe.transformer)
        pipe.unfuse_lora()
        for name, value in weights(pipe).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("method", ["fuse_lora", "delete_adapters"])
    def test_a_name_of_no_adapter(self, method):
        with pytest.raises(ValueError, match="no adapter called 'other'; the pipeline has \\['a'\\]"):
            getattr(adapted("a"), method)(adapter_names=["other"])


class TestWeights:
    @pytest.mark.parametrize(
        ("names", "given", "error", "message"),
        [
            (["a", "b"], [0.5, "0.5"], TypeError, "weight '0.5' is a str"),
            (["a", "b"], [0.5, {"transformer": float("nan")}], ValueError, "weight is nan"),
            (["a"], True, TypeError, "True is a bool"),
            ([], None, ValueError, r"adapter_names is empty; disable_lora\(\)"),
        ],
    )
    def test_what_is_none_changes_nothing(self, names, given, error, message):
        pipe = adapted("a", "b")
        pipe.set_adapters("b", 0.7)
        before = scalings(pipe)
        with pytest.raises(error, match=message):
            pipe.set_adapters(names, given)
        assert pipe.get_active_adapters() == ["b"]
        assert scalings(pipe) == before


@pytest.mark.parametrize("by", ["pipeline", "model"])
def test_a_model_whose_adapters_are_deleted_is_saved(by, tmp_path):
    pipe = adapted("a", "b")
    (pipe if by == "pipeline" else pipe.transformer).delete_adapters(["a", "b"])
    pipe.save_pretrained(tmp_path)
    loaded = TransDiffPipeline.from_pretrained(tmp_path).transformer.state_dict()
    wanted = tiny_pipeline().transformer.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


class TestSaving:
    def test_a_wrapped_model_keeps_its_configuration(self, tmp_path):
        pipe = adapted("a")
        wrapped = nn.Module()
        wrapped.module = pipe.transformer  # as DistributedDataParallel holds it
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=wrapped)
        loaded = tiny_pipeline()
        loaded.load_lora_weights(tmp_path, adapter_name="a")
        assert scalings(loaded) == scalings(pipe)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight_name": "style"}, "must end in .safetensors"),
            ({"weight_name": "sub/style.safetensors"}, "expected a file's name"),
            ({"weight_name": "style.safetensors", "safe_serialization": False}, "no safetensors file"),
        ],
    )
    def test_a_name_that_would_not_be_loaded(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            TransDiffPipeline.save_lora_weights(
                tmp_path / "new", transformer_lora_layers=adapted("a").transformer, **options
            )
        assert not (tmp_path / "new").exists()

    def test_what_are_no_layers(self, tmp_path):
        pipe = adapted("a")
        for layers in (pipe, list(pipe.transformer.parameters())):
            with pytest.raises(TypeError, match=f"are a {type(layers).__name__}; expected a model, or a dict"):
                TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)


class TestSources:
    @pytest.mark.parametrize("source", ["style/none.safetensors", "/nowhere/style", "./nowhere", Path("/nowhere")])
    def test_nothing_there(self, source):
        with pytest.raises(ValueError, match=f"there is no file or folder {source}"):
            tiny_pipeline().load_lora_weights(source)

    def test_kohyas_names_are_called_so(self):
        layers = convert_state_dict_to_kohya(get_peft_model_state_dict(adapted("a").transformer, adapter_name="a"))
        with pytest.raises(ValueError, match="kohya's names, with underscores, are not understood"):
            tiny_pipeline().load_lora_weights(layers)
