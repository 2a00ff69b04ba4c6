"""LoRA files of many origins: understood whole, or refused with what is wrong and the pipeline as it was."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import seeded, tiny_pipeline, tiny_transformer

from transdiff_pipelines import TransDiffPipeline


TARGETS = ["to_q", "to_v", "ff.net.2"]
COMPONENTS = ["condition_encoder", "transformer"]


def run(pipe, **kwargs):
    return pipe([1, 4], num_inference_steps=2, generator=seeded(), output_type="latent", **kwargs).images


def adapted(component="transformer", name="default", seed=0, **config):
    """A pipeline with a random adapter on a component, at scale 3 unless the config says otherwise."""
    pipe = tiny_pipeline()
    torch.manual_seed(seed)
    config = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **config}
    getattr(pipe, component).add_adapter(LoraConfig(**config), name)
    return pipe


def layers(pipe, component="transformer", name="default"):
    """The adapter's tensors, copied, under peft's names."""
    tensors = get_peft_model_state_dict(getattr(pipe, component), adapter_name=name)
    return {key: value.clone() for key, value in tensors.items()}


def named(tensors, prefix="transformer."):
    return {prefix + key: value for key, value in tensors.items()}


def at_scale_1(tensors):
    """What the tensors give where no alpha comes with them."""
    pipe = tiny_pipeline()
    pipe.load_lora_weights(named(tensors))
    return run(pipe)


def condition_of(pipe):
    """Everything that a failed load must leave as it was."""
    return [
        (
            [(key, type(module).__name__) for key, module in model.named_modules()],
            [(key, value.requires_grad, value.device.type) for key, value in model.named_parameters()],
            dict(model.config),
            bool(model._hf_peft_config_loaded),
            list(getattr(model, "peft_config", {})),
            [list(module.active_adapters) for module in model.modules() if hasattr(module, "base_layer")],
            [(key, id(module._hf_hook)) for key, module in model.named_modules() if hasattr(module, "_hf_hook")],
        )
        for model in (pipe.condition_encoder, pipe.transformer)
    ]


def kohya_like(tensors):
    """Factors called down and up, and alpha in an entry of its own."""
    renamed = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in tensors.items()
    }
    modules = {key.partition(".lora_")[0] for key in tensors}
    return renamed | {f"{module}.alpha": torch.tensor(6.0) for module in modules}


class TestScale:
    """alpha / rank is 3 in training, and is 3 when the file is loaded."""

    @pytest.mark.parametrize("what", ["model", "layers", "raw layers"])
    @pytest.mark.parametrize("component", COMPONENTS)
    def test_saving_keeps_it(self, what, component, tmp_path, caplog):
        trained = adapted(component)
        model = getattr(trained, component)
        given = {
            "model": model,
            "layers": get_peft_model_state_dict(model),
            "raw layers": {key: value for key, value in model.named_parameters() if "lora_" in key},
        }
        TransDiffPipeline.save_lora_weights(tmp_path, **{f"{component}_lora_layers": given[what]})
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(run(pipe), run(trained))
        assert not caplog.records

    def test_what_is_lost_is_said(self, tmp_path, caplog):
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers(adapted()))
        assert "saved without its configuration" in caplog.text
        assert "transformer_lora_layers=pipe.transformer" in caplog.text
        caplog.clear()
        tiny_pipeline().load_lora_weights(tmp_path)
        assert "does not say its alpha, so its scale is 1" in caplog.text

    def test_a_file_that_cannot_hold_it(self, tmp_path, caplog):
        TransDiffPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=adapted().transformer, safe_serialization=False
        )
        assert "only safetensors files" in caplog.text

    def test_one_of_several_adapters(self, tmp_path):
        pipe = adapted(name="first")
        torch.manual_seed(1)
        pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_k"]), "second")
        with pytest.raises(
            ValueError, match=r"has the adapters \['first', 'second'\]; adapter_name is None, name one"
        ):
            TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=pipe.transformer)
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=pipe.transformer, adapter_name="first")
        loaded = tiny_pipeline()
        loaded.load_lora_weights(tmp_path)
        assert torch.equal(run(loaded), run(adapted()))

    def test_the_layers_of_the_second_adapter_have_its_configuration(self, tmp_path):
        pipe = adapted(name="a")
        pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=12, target_modules=["to_k"]), "b")
        TransDiffPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name="b")
        )
        loaded = tiny_pipeline()
        loaded.load_lora_weights(tmp_path, adapter_name="b")
        assert loaded.transformer.peft_config["b"].lora_alpha == 12

    @pytest.mark.parametrize(
        "config",
        [
            {"use_rslora": True},
            {"use_dora": True},
            {"lora_bias": True},
            {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_q": 9}},
            {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
            {"target_modules": ["class_embedding", "to_q"]},
        ],
        ids=lambda config: next(iter(config)),
    )
    def test_every_kind_of_adapter_comes_back(self, config, tmp_path):
        component = "condition_encoder" if "target_modules" in config else "transformer"
        trained = adapted(component, **config)
        TransDiffPipeline.save_lora_weights(tmp_path, **{f"{component}_lora_layers": getattr(trained, component)})
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(run(pipe), run(trained))

    def test_the_file_of_a_model_alone(self, tmp_path):
        """`save_lora_adapter` names no component, in the tensors and in the configuration."""
        trained = adapted()
        trained.transformer.save_lora_adapter(tmp_path)
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(run(pipe), run(trained))

    @pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
    def test_pefts_own_folder(self, file, tmp_path):
        """alpha is in the file beside the weights."""
        trained = tiny_pipeline()
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
        get_peft_model(trained.transformer, config).save_pretrained(tmp_path)
        pipe = tiny_pipeline()
        pipe.load_lora_weights(tmp_path / file)
        assert torch.equal(run(pipe), run(trained))

    def test_alpha_of_each_layer(self):
        trained = adapted(alpha_pattern={"to_q": 9})
        file = named(kohya_like(layers(trained)))
        file = {key: torch.tensor(9.0) if key.endswith("to_q.alpha") else value for key, value in file.items()}
        pipe = tiny_pipeline()
        pipe.load_lora_weights(file)
        torch.testing.assert_close(run(pipe), run(trained))

    def test_the_default_name_has_one_file(self, tmp_path):
        """A folder with a LoRA in either format: the safetensors one would be loaded, though older."""
        TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=adapted().transformer)
        newer = adapted(seed=1)
        TransDiffPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=newer.transformer, safe_serialization=False
        )
        assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.bin"]
        TransDiffPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=newer.transformer, weight_name="mine.safetensors"
        )
        assert len(list(tmp_path.iterdir())) == 2  # a name of one's own takes nothing else away

    @pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"modules_to_save": ["proj_out"]}])
    def test_what_no_file_can_hold_is_not_saved(self, config, tmp_path):
        trained = adapted(**config)
        with pytest.raises(ValueError, match="is not a LoRA layer"):
            TransDiffPipeline.save_lora_weights(tmp_path, transformer_lora_layers=trained.transformer)
        assert not list(tmp_path.iterdir())


class TestNames:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda key: f"transformer.{key.replace('.weight', '.default.weight')}",  # named_parameters
            lambda key: f"transformer.{key.replace('.weight', '.my-style.weight')}",
            lambda key: f"transformer.base_model.model.{key}",
            lambda key: f"base_model.model.transformer.{key}",
            lambda key: f"base_model.model.{key.replace('.weight', '.default.weight')}",
            lambda key: f"module.transformer.{key}",
            lambda key: f"transformer.module.{key}",
            lambda key: f"_orig_mod.transformer.{key.replace('blocks.0', 'blocks.0._orig_mod')}",
            lambda key: f"transformer._fsdp_wrapped_module.{key}",
            lambda key: key,
            lambda key: f"transformer.{key.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}",
            lambda key: f"transformer.{key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}",
        ],
    )
    def test_what_others_write_around_the_names(self, rename):
        tensors = layers(adapted())
        pipe = tiny_pipeline()
        pipe.load_lora_weights({rename(key): value for key, value in tensors.items()})
        assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
        assert torch.equal(run(pipe), at_scale_1(tensors))

    def test_names_without_a_component_go_where_they_fit(self):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(layers(adapted("condition_encoder"), "condition_encoder"))
        assert pipe.get_list_adapters() == {"condition_encoder": ["default_0"]}

    def test_names_that_fit_both_components(self):
        tensors = layers(adapted(target_modules=["ff.net.2"]))
        with pytest.raises(ValueError, match="fit condition_encoder and transformer; put the component's name"):
            tiny_pipeline().load_lora_weights(tensors)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_become_the_models(self, dtype):
        tensors = layers(adapted())
        pipe = tiny_pipeline()
        pipe.load_lora_weights({key: value.to(dtype) for key, value in named(tensors).items()})
        assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}
        torch.testing.assert_close(run(pipe), at_scale_1(tensors), atol=0.1, rtol=0.1)

    def test_a_model_by_itself_reads_them_too(self):
        tensors = layers(adapted())
        pipe = tiny_pipeline()
        raw = {key.replace(".weight", ".default.weight"): value for key, value in named(tensors).items()}
        pipe.transformer.load_lora_adapter(raw, adapter_name="style")
        assert torch.equal(run(pipe), at_scale_1(tensors))


def half_of_a_pair(tensors):
    return {key: value for key, value in named(tensors).items() if not key.endswith("1.to_q.lora_B.weight")}


def a_deeper_model(tensors):
    return named(tensors) | named({key.replace("blocks.1", "blocks.7"): value for key, value in tensors.items()})


def both_components(tensors):
    """The encoder's half fits."""
    return named(layers(adapted("condition_encoder"), "condition_encoder"), "condition_encoder.") | {
        key: value[:, :5] for key, value in named(tensors).items()
    }


MISFITS = {
    "half of a pair": (half_of_a_pair, "missing 'transformer_blocks.0.attn1.to_q.lora_B.weight'"),
    "a deeper model": (a_deeper_model, "unexpected 'transformer_blocks.7.attn1.to_q.lora_A.weight', (.*) and 6 more"),
    "another width": (both_components, r"size mismatch for .*: \(2, 5\) in the file, \(2, 16\) expected"),
    "ranks of a pair": (
        lambda tensors: {k: v[:1] if "lora_A" in k else v for k, v in named(tensors).items()},
        r"size mismatch for .*: \(1, 16\) in the file, \(2, 16\) expected",
    ),
    "Flux": (
        lambda tensors: named({k.replace("transformer_", "single_transformer_"): v for k, v in tensors.items()}),
        "unexpected 'single_transformer_blocks.0",
    ),
    "Stable Diffusion": (lambda tensors: named(tensors, "unet.down_blocks.0."), "do not fit any"),
    "in part of no component": (
        lambda tensors: named(tensors) | {"text_encoder.q.lora_A.weight": torch.zeros(2, 2)},
        "1 of 21 tensors belong to no component, 'text_encoder.q.lora_A.weight'",
    ),
    "kohya": (
        lambda tensors: {
            f"lora_unet_{k.partition('.lora')[0].replace('.', '_')}.lora_down.weight": v for k, v in tensors.items()
        },
        "kohya's names, with underscores",
    ),
    "empty": (lambda tensors: {}, "the LoRA file is empty"),
    "a whole model": (lambda tensors: tiny_transformer().state_dict(), "is not a LoRA layer"),
    "biases": (
        lambda tensors: named(tensors) | {"transformer.proj_out.bias": torch.zeros(4)},
        "'transformer.proj_out.bias' is not",
    ),
    "a module to save": (
        lambda tensors: named(tensors) | {"transformer.proj_out.modules_to_save.default.weight": torch.zeros(4, 16)},
        "is not a LoRA layer",
    ),
    "integers": (lambda tensors: {k: v.to(torch.int8) for k, v in named(tensors).items()}, "of torch.int8"),
    "two adapters": (
        lambda tensors: (
            named(tensors) | {f"transformer.{k.replace('.weight', '.b.weight')}": v for k, v in tensors.items()}
        ),
        "two adapters of one layer",
    ),
    "a layer without linear": (
        lambda tensors: {
            "transformer.norm_out.lora_A.weight": torch.zeros(2, 16),
            "transformer.norm_out.lora_B.weight": torch.zeros(16, 2),
        },
        "is not supported",
    ),
    "alpha of nothing": (
        lambda tensors: named(tensors) | {"transformer.proj_out.alpha": torch.tensor(1.0)},
        "unexpected 'proj_out.alpha'",
    ),
    "no numbers": (lambda tensors: dict.fromkeys(named(tensors), 3), "is a int; expected a tensor"),
}


class TestMisfits:
    @pytest.mark.parametrize("name", MISFITS)
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_all_or_nothing(self, name, low_cpu_mem_usage):
        make, message = MISFITS[name]
        pipe = tiny_pipeline()
        before = condition_of(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(make(layers(adapted())), low_cpu_mem_usage=low_cpu_mem_usage)
        assert condition_of(pipe) == before

    @pytest.mark.parametrize("name", ["half of a pair", "a deeper model", "ranks of a pair", "Flux"])
    def test_a_model_by_itself(self, name):
        make, message = MISFITS[name]
        pipe = tiny_pipeline()
        before = condition_of(pipe)
        with pytest.raises(RuntimeError, match=message):  # torch's type for a state dict that does not fit
            pipe.transformer.load_lora_adapter(make(layers(adapted())))
        assert condition_of(pipe) == before

    def test_a_file_for_another_component(self):
        with pytest.raises(ValueError, match="none of the 20 tensors belongs to 'condition_encoder'"):
            tiny_pipeline().condition_encoder.load_lora_adapter(named(layers(adapted())), prefix="condition_encoder")

    def test_beside_another_adapter(self):
        pipe = adapted(name="there")
        expected, before = run(pipe), condition_of(pipe)
        with pytest.raises(ValueError, match="does not fit"):
            pipe.load_lora_weights(a_deeper_model(layers(adapted())), adapter_name="new")
        assert condition_of(pipe) == before
        assert torch.equal(run(pipe), expected)

    def test_a_configuration_that_asks_for_more_layers(self, tmp_path):
        """A file cut short, or of a model with fewer layers: its names all fit."""
        trained = adapted()
        tensors = {key: value for key, value in layers(trained).items() if "blocks.0" in key}
        TransDiffPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=tensors,
            transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
        )
        with pytest.raises(ValueError, match="missing 'transformer_blocks.1"):
            tiny_pipeline().load_lora_weights(tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"r": 8}, r"\(2, 16\) in the file, \(8, 16\) expected"),
            ({"r": 0}, "peft refuses it"),
            ({"from_the_future": 3}, "'from_the_future': 3}, which the installed peft does not know"),
            ({"use_dora": True}, "missing .*lora_magnitude_vector"),
            ({"lora_alpha": None}, "peft refuses it"),
        ],
    )
    def test_a_configuration_that_does_not_fit_the_tensors(self, config, message, tmp_path):
        trained = adapted()
        metadata = trained.transformer.peft_config["default"].to_dict() | config
        TransDiffPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=layers(trained), transformer_lora_adapter_metadata=metadata
        )
        pipe = tiny_pipeline()
        before = condition_of(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path)
        assert condition_of(pipe) == before

    def test_a_configuration_that_is_no_json(self, tmp_path):
        file = tmp_path / "lora.safetensors"
        save_file(named(layers(adapted())), file, metadata={"format": "pt", "lora_adapter_metadata": "{oops"})
        with pytest.raises(ValueError, match="is no JSON"):
            tiny_pipeline().load_lora_weights(file)

    def test_a_later_pefts_entry_that_is_off(self, tmp_path):
        trained = adapted()
        config = {"from_the_future": False, **trained.transformer.peft_config["default"].to_dict()}
        config["target_modules"] = sorted(config["target_modules"])
        metadata = {f"transformer.{key}": value for key, value in config.items()}
        file = tmp_path / "lora.safetensors"
        save_file(named(layers(trained)), file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
        pipe = tiny_pipeline()
        pipe.load_lora_weights(file)
        assert torch.equal(run(pipe), run(trained))

    def test_a_folder_without_a_lora(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "checkpoint-500.safetensors")
        with pytest.raises(ValueError, match="name it with weight_name="):
            tiny_pipeline().load_lora_weights(tmp_path)


class TestFailures:
    @pytest.mark.parametrize("there", [False, True])
    def test_an_error_in_the_second_component_takes_the_first_back(self, there, monkeypatch, tmp_path):
        trained = adapted()
        trained.condition_encoder.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        TransDiffPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=trained.transformer,
            condition_encoder_lora_layers=trained.condition_encoder,
        )
        pipe = adapted(name="there", target_modules=["to_k", "to_q"]) if there else tiny_pipeline()
        before, expected = condition_of(pipe), run(pipe)
        import peft

        real = peft.set_peft_model_state_dict

        def fail(model, *args, **kwargs):
            if model is pipe.transformer:
                raise MemoryError("out of it")
            return real(model, *args, **kwargs)

        monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
        with pytest.raises(MemoryError):
            pipe.load_lora_weights(tmp_path)
        assert condition_of(pipe) == before
        assert torch.equal(run(pipe), expected)
        monkeypatch.undo()
        pipe.load_lora_weights(tmp_path)

    def test_a_name_taken_in_the_other_component(self):
        """Half of one adapter and half of another under one name would be a third."""
        pipe = adapted("condition_encoder", name="style")
        before = condition_of(pipe)
        with pytest.raises(ValueError, match="style already in use in condition_encoder"):
            pipe.load_lora_weights(named(layers(adapted())), adapter_name="style")
        assert condition_of(pipe) == before

    @pytest.mark.parametrize("name", ["my.style", "", "keys", "type", "weight", "lora_A"])
    def test_names_that_peft_cannot_keep(self, name):
        pipe = tiny_pipeline()
        before = condition_of(pipe)
        with pytest.raises(ValueError, match="adapter_name is"):
            pipe.load_lora_weights(named(layers(adapted())), adapter_name=name)
        with pytest.raises(ValueError, match="adapter_name is"):
            pipe.transformer.load_lora_adapter(named(layers(adapted())), adapter_name=name)
        with pytest.raises(ValueError, match="adapter_name is"):
            pipe.transformer.add_adapter(LoraConfig(target_modules=TARGETS), name)
        assert condition_of(pipe) == before

    def test_a_name_that_is_none(self):
        with pytest.raises(TypeError, match="adapter_name 3 is a int"):
            tiny_pipeline().load_lora_weights(named(layers(adapted())), adapter_name=3)

    def test_an_adapter_to_train_that_has_no_layer(self):
        pipe = tiny_pipeline()
        before = condition_of(pipe)
        with pytest.raises(ValueError, match="not found in the base model"):
            pipe.transformer.add_adapter(LoraConfig(target_modules=["nowhere"]))
        assert condition_of(pipe) == before
        pipe.transformer.add_adapter(LoraConfig(target_modules=TARGETS))

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ("fused", "are fused into the weights of"),
            ("projections", "takes no part while projections are fused"),
            ("meta", "on the meta device"),
            ("cast", "has layerwise casting on"),
            ("offloaded", "offloaded by accelerate"),
        ],
    )
    def test_models_that_cannot_take_an_adapter_now(self, state, message):
        import accelerate

        pipe = adapted(name="there") if state == "fused" else tiny_pipeline()
        if state == "fused":
            pipe.fuse_lora()
        elif state == "projections":
            pipe.transformer.fuse_qkv_projections()
        elif state == "meta":
            pipe.transformer.to("meta")
        elif state == "cast":
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        else:
            accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
        before = condition_of(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(named(layers(adapted())))
        with pytest.raises(ValueError, match=message):
            pipe.transformer.load_lora_adapter(named(layers(adapted())))
        assert condition_of(pipe) == before

    def test_fused_projections_would_leave_an_adapter_out(self):
        pipe = adapted()
        expected = run(pipe)
        with pytest.raises(ValueError, match="'transformer_blocks.0.attn1.to_q' has a LoRA adapter"):
            pipe.transformer.fuse_qkv_projections()
        assert torch.equal(run(pipe), expected)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(run(pipe), expected, atol=1e-4, rtol=1e-4)

    def test_sequential_offloading_is_taken_up_again(self):
        pipe = tiny_pipeline()
        pipe.enable_sequential_cpu_offload(device="cpu")
        before = condition_of(pipe)
        with pytest.raises(ValueError, match="does not fit"):
            pipe.load_lora_weights(half_of_a_pair(layers(adapted())))
        assert condition_of(pipe) == before
        pipe.load_lora_weights(named(layers(adapted())))
        offloaded = {parameter.device.type for parameter in pipe.transformer.parameters()}
        assert offloaded == {"meta"}
        assert all(hasattr(layer, "_hf_hook") for key, layer in pipe.transformer.named_modules() if "lora_A." in key)

    def test_model_offloading_stays(self):
        pipe = tiny_pipeline()
        pipe.enable_model_cpu_offload(device="cpu")
        hooks = condition_of(pipe)[1][-1]
        pipe.load_lora_weights(named(layers(adapted())))
        assert condition_of(pipe)[1][-1] == hooks
        assert torch.equal(run(pipe), at_scale_1(layers(adapted())))


class TestHotswap:
    def test_a_file_with_new_layers_leaves_the_adapter(self):
        pipe = adapted(name="style", target_modules=["to_q"])
        expected, before = run(pipe), condition_of(pipe)
        with pytest.raises(ValueError, match="does not adapt; load it without hotswap"):
            pipe.load_lora_weights(named(layers(adapted())), adapter_name="style", hotswap=True)
        assert condition_of(pipe) == before
        assert torch.equal(run(pipe), expected)

    def test_a_file_for_the_other_component(self):
        pipe = adapted("condition_encoder", name="style")
        with pytest.raises(ValueError, match="style already in use in condition_encoder"):
            pipe.load_lora_weights(named(layers(adapted())), adapter_name="style", hotswap=True)

    def test_no_such_adapter(self):
        with pytest.raises(ValueError, match="has none called 'style'"):
            tiny_pipeline().load_lora_weights(named(layers(adapted())), adapter_name="style", hotswap=True)

    def test_layers_of_several_scales(self):
        """peft would give all of them the first one's."""
        pipe = adapted(name="style", lora_alpha=2)
        expected = run(pipe)
        file = named(kohya_like(layers(adapted(seed=1))))
        file = {key: torch.tensor(9.0) if key.endswith("0.attn1.to_q.alpha") else value for key, value in file.items()}
        with pytest.raises(ValueError, match=r"another scale|incompatible"):
            pipe.load_lora_weights(file, adapter_name="style", hotswap=True)
        assert torch.equal(run(pipe), expected)


class TestAttentionKwargs:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"lora_scale": 0.5}, ValueError, r"attention_kwargs has \['lora_scale'\], which nothing reads"),
            ({"scale": 0.5, "ip_adapter_image": 1}, ValueError, r"\['ip_adapter_image'\]"),
            ({"scale": "0.5"}, TypeError, "is a str; expected a number"),
            ({"scale": None}, TypeError, "is a NoneType; expected a number"),
            ({"scale": True}, TypeError, "is a bool; expected a number"),
            ({"scale": float("nan")}, ValueError, "is nan; expected a finite number"),
            (0.5, TypeError, "attention_kwargs 0.5 is a float; expected a dict"),
            (["scale"], TypeError, "is a list; expected a dict"),
        ],
    )
    def test_what_nothing_reads_is_an_error(self, given, error, message):
        pipe = tiny_pipeline()
        with pytest.raises(error, match=message):
            run(pipe, attention_kwargs=given)
        with pytest.raises(error, match=message):
            pipe.transformer(torch.zeros(1, 4, 4, 4), 1.0, torch.zeros(1, 4, 16), attention_kwargs=given)
        with pytest.raises(error, match=message):
            pipe.condition_encoder(torch.tensor([1]), attention_kwargs=given)

    def test_a_fused_adapter_cannot_be_weighed(self):
        pipe = adapted()
        pipe.fuse_lora()
        with pytest.raises(ValueError, match=r"has scale 0.5, but LoRA adapters are fused"):
            run(pipe, attention_kwargs={"scale": 0.5})
        run(pipe, attention_kwargs={"scale": 1})

    def test_a_weight_of_no_adapter_is_said(self, caplog):
        run(tiny_pipeline(), attention_kwargs={"scale": 0.5})
        assert "no LoRA is loaded" in caplog.text

    @pytest.mark.parametrize("given", [None, {}, {"scale": 1.0}, {"scale": 0.5}])
    def test_what_is_fine_is_quiet(self, given, caplog):
        run(adapted(), attention_kwargs=given)
        assert not caplog.records


def test_a_training_run_is_named_by_its_folder(tmp_path):
    trained, pipe = adapted(), tiny_pipeline()
    trained.save_lora_weights(tmp_path / "run" / "lora", transformer_lora_layers=layers(trained))
    pipe.load_lora_weights(str(tmp_path / "run"))
    assert pipe.get_active_adapters() == ["default_0"]
