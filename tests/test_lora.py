"""LoRA adapters on the condition encoder and the decoder: training, files, weights, fusing, removal."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rounding import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import TransDiffPipeline


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
COMPONENTS = ["condition_encoder", "transformer"]


@pytest.fixture
def pipe():
    return tiny_pipeline()


def lora_config(rank=2, alpha=6, seed=0):
    torch.manual_seed(seed)  # peft draws the adapter from the global generator
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False)


def run(pipe, **kwargs):
    return pipe([1, 4], num_inference_steps=2, generator=seeded(), output_type="latent", **kwargs).images


def save_adapter(folder, components=COMPONENTS, seed=0, **config):
    """What a training script does: add an adapter to each component, train it, save it."""
    pipe = tiny_pipeline()
    arguments = {}
    for name in components:
        model = getattr(pipe, name)
        model.add_adapter(lora_config(seed=seed, **config))
        arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        arguments[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    TransDiffPipeline.save_lora_weights(folder, **arguments)
    return run(pipe)


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path)
    return tmp_path


class TestFiles:
    @pytest.mark.parametrize("components", [COMPONENTS, ["transformer"], ["condition_encoder"]])
    def test_a_saved_adapter_gives_the_images_it_gave_in_training(self, pipe, components, tmp_path):
        base = run(pipe)
        trained = save_adapter(tmp_path, components)
        assert not torch.allclose(trained, base)
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(run(pipe), trained)
        assert pipe.get_list_adapters() == {name: ["default_0"] for name in components}

    def test_keys_are_peft_names_behind_the_component(self, adapter):
        keys = load_file(adapter / "pytorch_lora_weights.safetensors")
        assert "transformer.transformer_blocks.1.attn2.to_k.lora_A.weight" in keys
        assert "condition_encoder.transformer_blocks.0.ff.net.0.proj.lora_B.weight" in keys
        with safe_open(adapter / "pytorch_lora_weights.safetensors", "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        assert config["transformer.lora_alpha"] == config["condition_encoder.lora_alpha"] == 6

    def test_a_plain_state_dict_serves_too(self, pipe, adapter):
        state_dict = load_file(adapter / "pytorch_lora_weights.safetensors")
        pipe.load_lora_weights(state_dict)
        # Without the config in a file's metadata alpha is taken to be the rank: 6 / 2 = 3 times less.
        without_config = run(pipe)
        pipe.set_adapters("default_0", 3.0)
        scaled = run(pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(adapter)
        assert_close(run(pipe), scaled)
        assert not torch.allclose(without_config, scaled)

    def test_a_model_takes_the_file_by_itself(self, adapter):
        """As in a training script that goes on from an adapter."""
        pipe, alone = tiny_pipeline(), tiny_pipeline()
        pipe.load_lora_weights(adapter)
        for name in COMPONENTS:
            getattr(alone, name).load_lora_adapter(adapter, prefix=name, use_safetensors=True)
        assert torch.equal(run(pipe), run(alone))

    def test_only_the_main_process_writes(self, tmp_path):
        layers = {"lora_A.weight": torch.zeros(2)}
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, is_main_process=False)
        assert not list(tmp_path.iterdir())

    def test_an_interrupted_save_keeps_the_file_that_was_there(self, tmp_path):
        layers = {"a.lora_A.weight": torch.ones(2)}
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

        def fail(weights, path):
            save_file({"half": torch.zeros(1)}, path)
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, save_function=fail)
        assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
        assert torch.equal(next(iter(load_file(next(tmp_path.iterdir())).values())), torch.ones(2))

    def test_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="no LoRA layers to save"):
            TransDiffPipeline.save_lora_weights(tmp_path)

    def test_not_a_lora_file(self, pipe):
        with pytest.raises(ValueError, match=r"'transformer.proj_in.weight' is not a LoRA layer"):
            pipe.load_lora_weights({"transformer.proj_in.weight": torch.zeros(2)})

    def test_unknown_option(self, pipe, adapter):
        with pytest.raises(TypeError, match=r"unknown options \['weights_name'\]"):
            pipe.load_lora_weights(adapter, weights_name="x")

    def test_keys_of_no_component_are_an_error(self, pipe):
        base = run(pipe)
        with pytest.raises(ValueError, match=r"'unet.mid.lora_A.weight' for one, and they do not fit any"):
            pipe.load_lora_weights({"unet.mid.lora_A.weight": torch.zeros(2)})
        assert torch.equal(run(pipe), base)

    def test_a_file_that_does_not_fit_changes_nothing(self, pipe, adapter):
        """The encoder's half fits and is taken back when the decoder's does not."""
        base = run(pipe)
        state_dict = load_file(adapter / "pytorch_lora_weights.safetensors")
        key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
        with pytest.raises(RuntimeError, match="size mismatch"):
            pipe.load_lora_weights({**state_dict, key: torch.zeros(2, 5)}, low_cpu_mem_usage=False)
        assert not any(pipe.get_list_adapters().values())
        assert torch.equal(run(pipe), base)
        pipe.load_lora_weights(adapter)

    def test_a_taken_name(self, pipe, adapter):
        pipe.load_lora_weights(adapter, adapter_name="style")
        before = run(pipe)
        with pytest.raises(ValueError, match="style already in use"):
            pipe.load_lora_weights(adapter, adapter_name="style")
        assert torch.equal(run(pipe), before)


class TestAdapters:
    def test_weights(self, pipe, adapter):
        base = run(pipe)
        pipe.load_lora_weights(adapter, adapter_name="style")
        full = run(pipe)
        pipe.set_adapters("style", 0.0)
        assert_close(run(pipe), base)
        pipe.set_adapters("style", 0.5)
        half = run(pipe)
        assert not torch.allclose(half, base)
        assert not torch.allclose(half, full)
        pipe.set_adapters("style", {"condition_encoder": 1.0, "transformer": 0.0})
        encoder_only = run(pipe)
        assert not torch.allclose(encoder_only, full)
        assert not torch.allclose(encoder_only, base)
        pipe.set_adapters("style")
        assert torch.equal(run(pipe), full)

    def test_attention_kwargs_scale_one_call(self, pipe, adapter):
        pipe.load_lora_weights(adapter, adapter_name="style")
        full = run(pipe)
        scaled = run(pipe, attention_kwargs={"scale": 0.5})
        assert torch.equal(run(pipe), full)
        pipe.set_adapters("style", 0.5)
        assert_close(run(pipe), scaled)

    def test_two_adapters_mix(self, pipe, adapter, tmp_path):
        save_adapter(tmp_path / "second", ["transformer"], seed=1)
        pipe.load_lora_weights(adapter, adapter_name="first")
        first = run(pipe)
        pipe.load_lora_weights(tmp_path / "second", adapter_name="second")
        assert pipe.get_list_adapters() == {"condition_encoder": ["first"], "transformer": ["first", "second"]}
        second_too = run(pipe)
        pipe.set_adapters(["first", "second"], [1.0, 0.5])
        assert pipe.get_active_adapters() == ["first", "second"]
        mixed = run(pipe)
        assert not torch.allclose(mixed, first)
        assert not torch.allclose(mixed, second_too)
        pipe.set_adapters(["first", "second"], [1.0, 0.0])
        assert_close(run(pipe), first)

    def test_disable_and_enable(self, pipe, adapter):
        base = run(pipe)
        pipe.load_lora_weights(adapter)
        with_adapter = run(pipe)
        pipe.disable_lora()
        assert torch.equal(run(pipe), base)
        pipe.enable_lora()
        assert torch.equal(run(pipe), with_adapter)

    def test_fuse_and_unfuse(self, pipe, adapter):
        base = run(pipe)
        pipe.load_lora_weights(adapter, adapter_name="style")
        with_adapter = run(pipe)
        pipe.fuse_lora()
        assert pipe.num_fused_loras == 1
        assert_close(run(pipe), with_adapter)
        pipe.disable_lora()  # a fused adapter is part of the weights
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        assert_close(run(pipe), base)

    def test_fuse_one_component(self, pipe, adapter):
        pipe.load_lora_weights(adapter)
        before = copy.deepcopy(pipe.condition_encoder.state_dict())
        pipe.fuse_lora(components=["transformer"])
        assert all(torch.equal(before[name], value) for name, value in pipe.condition_encoder.state_dict().items())
        with pytest.raises(ValueError, match="vae is not found"):
            pipe.fuse_lora(components=["vae"])

    def test_delete(self, pipe, adapter, tmp_path):
        base = run(pipe)
        save_adapter(tmp_path / "second", seed=1)
        pipe.load_lora_weights(adapter, adapter_name="first")
        first = run(pipe)
        pipe.load_lora_weights(tmp_path / "second", adapter_name="second")
        pipe.delete_adapters("second")
        pipe.set_adapters("first")
        assert torch.equal(run(pipe), first)
        pipe.delete_adapters(["first"])
        assert pipe.get_active_adapters() == []
        assert_close(run(pipe), base)

    @pytest.mark.parametrize("scale", [0.0, 0.5])
    def test_a_scale_holds_for_one_call(self, pipe, adapter, tmp_path, scale):
        """Also 0: no adapter for this call, and all of them at their weights in the next."""
        base = run(pipe)
        save_adapter(tmp_path / "second", seed=1)
        pipe.load_lora_weights(adapter, adapter_name="a")
        pipe.load_lora_weights(tmp_path / "second", adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.5, 0.2])
        expected = run(pipe)
        scaled = run(pipe, attention_kwargs={"scale": scale})
        assert not torch.equal(scaled, expected)
        if scale == 0:
            assert_close(scaled, base)
        else:
            assert not torch.allclose(scaled, base, rtol=1e-3, atol=1e-3)
        assert torch.equal(run(pipe), expected)

    def test_unload_is_never_having_loaded(self, pipe, adapter):
        base, keys = run(pipe), set(pipe.transformer.state_dict())
        pipe.load_lora_weights(adapter)
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe), base)
        assert set(pipe.transformer.state_dict()) == keys
        pipe.load_lora_weights(adapter)  # and it can be loaded again

    def test_hotswap(self, pipe, adapter, tmp_path):
        swapped = save_adapter(tmp_path / "second", seed=1)
        pipe.load_lora_weights(adapter, adapter_name="style")
        pipe.load_lora_weights(tmp_path / "second", adapter_name="style", hotswap=True)
        assert_close(run(pipe), swapped)

    def test_wrong_name(self, pipe, adapter):
        pipe.load_lora_weights(adapter, adapter_name="style")
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            pipe.set_adapters("stile")


class TestTraining:
    def test_only_the_adapter_learns(self, pipe):
        transformer = pipe.transformer
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
        trainable = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        assert trainable
        assert all("lora" in name for name in trainable)
        transformer.enable_gradient_checkpointing()
        optimizer = torch.optim.Adam((p for p in transformer.parameters() if p.requires_grad), lr=0.01)
        x, condition, target = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 16), torch.randn(2, 4, 4, 4)
        losses = []
        for _ in range(5):
            loss = (transformer(x, 500.0, condition).sample - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
