"""Saving: what a folder or repository has is loaded as what was seen, and nothing is half there."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffPipeline, TransDiffTransformer2DModel
from transdiff_pipelines.models.saving import older_forms, upload_one_form


FORMS = {
    "whole": {},
    "shards": {"max_shard_size": "20KB"},
    "bin": {"safe_serialization": False},
    "bin shards": {"safe_serialization": False, "max_shard_size": "20KB"},
}
WEIGHTS = "diffusion_pytorch_model"


def run(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 4], num_inference_steps=2, generator=seeded(), output_type="latent", **kwargs).images


def changed_pipeline():
    """Other weights than the tiny pipeline's, in every component."""
    pipe = tiny_pipeline()
    for model in (pipe.condition_encoder, pipe.transformer, pipe.vae):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    return pipe


def reading(form):
    """diffusers finds shards that are no safetensors only when told so."""
    return {"use_safetensors": False} if form == "bin shards" else {}


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestOlderForms:
    @pytest.mark.parametrize("after", FORMS)
    @pytest.mark.parametrize("before", FORMS)
    def test_a_pipeline_over_an_older_one(self, before, after, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path / "a", **FORMS[before])
        pipe = changed_pipeline()
        pipe.save_pretrained(tmp_path / "a", **FORMS[after])
        pipe.save_pretrained(tmp_path / "fresh", **FORMS[after])
        assert files(tmp_path / "a") == files(tmp_path / "fresh")
        loaded = TransDiffPipeline.from_pretrained(tmp_path / "a", **reading(after))
        assert all(
            same(getattr(loaded, name), getattr(pipe, name)) for name in ("condition_encoder", "transformer", "vae")
        )

    @pytest.mark.parametrize("after", FORMS)
    def test_a_model_over_an_older_one(self, after, tmp_path):
        for before in FORMS:
            tiny_pipeline().transformer.save_pretrained(tmp_path, **FORMS[before])
        model = changed_pipeline().transformer
        model.save_pretrained(tmp_path, **FORMS[after])
        assert same(TransDiffTransformer2DModel.from_pretrained(tmp_path, **reading(after)), model)

    def test_other_variants_and_other_files_stay(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path, variant="half", max_shard_size="20KB")
        (tmp_path / "README.md").write_text("mine")
        (tmp_path / "transformer/notes.bin").write_text("mine")
        pipe = changed_pipeline()
        pipe.save_pretrained(tmp_path)
        pipe.save_pretrained(tmp_path, variant="half")
        names = files(tmp_path / "transformer")
        assert names == ["config.json", f"{WEIGHTS}.half.safetensors", f"{WEIGHTS}.safetensors", "notes.bin"]
        assert (tmp_path / "README.md").read_text() == "mine"
        assert same(TransDiffPipeline.from_pretrained(tmp_path, variant="half").transformer, pipe.transformer)

    def test_which_names_mean_the_same(self):
        present = [
            f"{WEIGHTS}.safetensors",
            f"{WEIGHTS}-00001-of-00002.safetensors",
            f"{WEIGHTS}.safetensors.index.json",
            f"{WEIGHTS}.bin.index.json",
            f"vae/{WEIGHTS}.bin",
            f"{WEIGHTS}.fp16.bin",
            f"{WEIGHTS}.fp16-00001-of-00002.safetensors",
            f"{WEIGHTS}-00001-of-00002.fp16.safetensors",
            f"{WEIGHTS}.safetensors.index.fp16.json",
            "config.json",
            "model.safetensors",
        ]
        assert older_forms(present, [f"{WEIGHTS}.bin", "config.json"]) == present[:4]
        assert older_forms(present, [f"{WEIGHTS}.fp16.safetensors"]) == present[5:9]
        assert older_forms(present, ["config.json"]) == []

    def test_a_save_that_fails_leaves_what_was_there(self, tmp_path, monkeypatch):
        tiny_pipeline().save_pretrained(tmp_path)
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
        pipe = changed_pipeline()

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(type(pipe.vae), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            pipe.save_pretrained(tmp_path, safe_serialization=False)
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before

    @pytest.mark.parametrize("what", ["pipeline", "model", "model, pushed", "lora"])
    def test_folders_and_files_have_the_rights_that_others_have(self, what, tmp_path, monkeypatch):
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").touch()
        pipe, saved = tiny_pipeline(), tmp_path / "saved"
        if what == "pipeline":
            pipe.save_pretrained(saved)
        elif what == "lora":
            pipe.save_lora_weights(saved, transformer_lora_layers=with_lora(pipe).transformer)
        else:
            hub = {"create_repo": SimpleNamespace(repo_id="you/model"), "load_or_create_model_card": ModelCard("")}
            for name, answer in hub.items():
                monkeypatch.setattr(f"diffusers.models.modeling_utils.{name}", lambda *_, answer=answer, **__: answer)
            monkeypatch.setattr(pipe.transformer, "_upload_folder", lambda *_, **__: None)
            pipe.transformer.save_pretrained(saved, push_to_hub="pushed" in what)
        assert any(name.endswith(".safetensors") for name in files(saved))
        for path in saved.rglob("*"):
            usual = tmp_path / "plain" if path.is_dir() else tmp_path / "plain" / "file"
            assert path.stat().st_mode == usual.stat().st_mode, path

    def test_a_repository_too(self, tmp_path, monkeypatch):
        """What is uploaded takes the place of weights that the repository has in another form."""
        import huggingface_hub

        (tmp_path / "transformer").mkdir()
        (tmp_path / f"transformer/{WEIGHTS}.bin").write_text("")
        there = [f"transformer/{WEIGHTS}.safetensors", f"vae/{WEIGHTS}.safetensors", "README.md"]
        asked = {}
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [f"sub/{name}" for name in there])
        monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: asked.update(options))
        upload_one_form(tmp_path, "you/model", "sub", commit_message="x")
        assert asked["delete_patterns"] == [f"transformer/{WEIGHTS}.safetensors"]
        assert asked["path_in_repo"] == "sub"


def with_lora(pipe):
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(**config), "style")
    return pipe


STATES = {
    "loaded": lambda pipe: None,
    "weighed": lambda pipe: pipe.set_adapters("style", 0.5),
    "disabled": lambda pipe: pipe.disable_lora(),
    "several": lambda pipe: pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "second"),
    "fused": lambda pipe: pipe.fuse_lora(),
    "fused in part": lambda pipe: pipe.fuse_lora(lora_scale=0.5),
    "compiled": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
}
REMEDIES = {"fused": "unload_lora_weights", "fused in part": "unload_lora_weights"}


class TestLora:
    @pytest.mark.parametrize("state", STATES)
    def test_no_way_of_saving_takes_lora_layers(self, state, tmp_path):
        pipe = with_lora(tiny_pipeline())
        STATES[state](pipe)
        expected = run(pipe)
        ways = {
            "a pipeline": lambda folder: pipe.save_pretrained(folder),
            "with code": lambda folder: pipe.save_pretrained(folder, include_code=True),
            "a variant": lambda folder: pipe.save_pretrained(folder, variant="fp16", safe_serialization=False),
            "and pushing": lambda folder: pipe.save_pretrained(folder, push_to_hub=True),
            "an editing pipeline": TransDiffImg2ImgPipeline.from_pipe(pipe).save_pretrained
            if state != "compiled"
            else pipe.save_pretrained,
            "a model": lambda folder: pipe.transformer.save_pretrained(folder),
            "a model in shards": lambda folder: pipe.transformer.save_pretrained(folder, max_shard_size="20KB"),
            # No repository is made either: there is no network here, which would be another error.
            "pushing": lambda folder: pipe.push_to_hub("you/model"),
            "pushing a model": lambda folder: pipe.transformer.push_to_hub("you/model"),
        }
        for save in ways.values():
            with pytest.raises(
                ValueError, match=r"cannot be saved with the LoRA adapters \['style'.*unload_lora_weights"
            ):
                save(tmp_path / "a")
            assert not (tmp_path / "a").exists()
        assert torch.equal(run(pipe), expected)

    @pytest.mark.parametrize("state", ["loaded", "weighed", "several", "fused", "fused in part"])
    def test_the_remedy_saves_what_is_seen(self, state, tmp_path):
        pipe = with_lora(tiny_pipeline())
        STATES[state](pipe)
        expected = run(pipe)
        if "fused" not in state:
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path)
        torch.testing.assert_close(run(TransDiffPipeline.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4)

    def test_adapters_kept_apart(self, tmp_path):
        pipe = with_lora(tiny_pipeline())
        expected = run(pipe)
        pipe.save_lora_weights(tmp_path / "lora", transformer_lora_layers=pipe.transformer)
        pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path / "base")
        pipe = TransDiffPipeline.from_pretrained(tmp_path / "base")
        pipe.load_lora_weights(tmp_path / "lora")
        assert torch.equal(run(pipe), expected)

    def test_layers_that_peft_put_in_by_itself(self, tmp_path):
        pipe = tiny_pipeline()
        get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="transformer cannot be saved with the LoRA"):
            pipe.save_pretrained(tmp_path / "a")

    def test_a_vae_with_an_adapter(self, tmp_path):
        pipe = tiny_pipeline()
        pipe.vae.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="vae cannot be saved with the LoRA"):
            pipe.save_pretrained(tmp_path / "a")

    def test_an_older_save_is_left_alone(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        before = files(tmp_path)
        with pytest.raises(ValueError, match="cannot be saved"):
            with_lora(changed_pipeline()).save_pretrained(tmp_path, safe_serialization=False)
        assert files(tmp_path) == before
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "TransDiffPipeline"
        assert same(DiffusionPipeline.from_pretrained(tmp_path).transformer, tiny_pipeline().transformer)


def test_a_training_run_is_loaded_by_its_folder(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    assert same(TransDiffPipeline.from_pretrained(str(tmp_path / "run")).transformer, pipe.transformer)
    with pytest.raises(OSError, match="is a part of a pipeline; name the whole of it"):
        TransDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline" / "vae")
