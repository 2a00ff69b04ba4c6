"""Every shipped recipe, run small: the file's own settings with tiny networks, tiny data and two steps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import seeded, tiny_encoder, tiny_pipeline, tiny_transformer

from training.cache_latents import cache_latents
from training.data.errors import DataError
from training.data.latent_cache import LatentCache
from training.outputs.checkpoints import checkpoint_folders
from training.settings.config import ConfigError, DataConfig, TrainConfig, accumulation_steps, load_config
from training.trainer import Trainer
from transdiff_pipelines import FlowMapScheduler, TransDiffPipeline, half_precision
from transdiff_pipelines.presets import PUBLISHED, PublishedModel


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
NAMES = {0: "10", 1: "lynx", 2: "1, one", 3: "2", 4: "owl"}  # the data's classes are 1, 2, 10
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.fixture(scope="session")
def base(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1-step pipeline for 4 x 4 latents whose classes are partly those of the data."""
    return save_base(tmp_path_factory.mktemp("base"), vae, 4)


@pytest.fixture(scope="session")
def large_cache(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """The tiny data at twice the resolution: 8 x 8 latents."""
    return cache_latents(replace(data_config, image_size=32, cache=str(tmp_path_factory.mktemp("large") / "cache")))


def save_base(folder: Path, vae: Path, side: int, patch_size: int = 1) -> Path:
    parts = {"condition_encoder": tiny_encoder(patch_size, side), "transformer": tiny_transformer(side)}
    tiny_pipeline(vae=AutoencoderKL.from_pretrained(vae), id2label=NAMES, **parts).save_pretrained(folder)
    return folder


@pytest.fixture
def small(cache: LatentCache, vae: Path, base: Path, tmp_path: Path):
    """`small("recipe", **changes)`: the shipped configuration with tiny sizes."""

    def load(name: str, **changes) -> TrainConfig:
        settings = {
            "output": tmp_path / "run",
            "data.vae": vae,
            "data.cache": cache.folder,
            "data.image_size": 16,
            "data.mirror": True,
            "data.batch_size": 2,
            "data.workers": 0,
            "optimizer.global_batch_size": 4,
            "schedule.epochs": "null",
            "schedule.steps": 2,
            "schedule.warmup_epochs": "null",
            "schedule.warmup_steps": 1,
            "preview.every": "null",
            "log_every": 1,
        }
        tree = load_config([f"--config={CONFIGS / name}.yaml"])
        if tree.model.start_from is None:
            settings |= {"model.preset": "null", "model.num_class_tokens": 3}
            settings |= {f"model.{key}": value for key, value in SIZES.items()}
        else:
            settings |= {"model.start_from": base}
        if tree.model.classes == "by_id":  # the tiny base has more classes than the data
            settings["model.classes"] = "by_name"
        settings |= changes
        return load_config(
            [f"--config={CONFIGS / name}.yaml", *(f"--{key}={value}" for key, value in settings.items())]
        )

    return load


def train(config: TrainConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    lines = [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * trainer.rate.total_steps
    return trainer


def final_pipeline(trainer: Trainer) -> TransDiffPipeline:
    pipeline = TransDiffPipeline.from_pretrained(trainer.output / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(module: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    """Names of the tensors that are equal in both."""
    state = other.state_dict()
    return {name for name, value in module.state_dict().items() if name in state and value.equal(state[name])}


def test_own_images_from_scratch(small) -> None:
    trainer = train(small("own_images"))
    assert final_pipeline(trainer)("10", num_inference_steps=2).images[0].size == (16, 16)


# --- the published runs ---


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_hold_the_published_numbers(published: PublishedModel) -> None:
    config = load_config([f"--config={CONFIGS / published.folder}.yaml"])
    sampling = config.sampling
    assert (sampling.guidance_scale, sampling.drift_scale, sampling.diffusion_scale) == (
        published.guidance_scale,
        published.drift_scale,
        published.diffusion_scale,
    )
    assert (config.model.patch_size, config.data.image_size) == (published.patch_size, published.resolution)
    if config.model.start_from is None:
        assert config.model.preset == published.size.name
    else:
        assert config.model.start_from == f"outputs/transdiff_{published.size.name.lower()}/pipeline"
    released = {1: 16 if published.resolution == 512 else 32, 2: 16}[published.patch_size]
    assert config.data.batch_size == released
    assert accumulation_steps(config, 64) == 32 // released  # the released recipe ran on 64 GPUs


@pytest.mark.parametrize("name", ["transdiff_b", "transdiff_l", "transdiff_h"])
def test_one_step_from_scratch(small, name: str) -> None:
    trainer = train(small(name))
    assert trainer.rate.peak == pytest.approx(1e-4 * 4 / 256)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert final_pipeline(trainer)("2", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize("name", ["transdiff_b_mrar", "transdiff_l_mrar", "transdiff_h_mrar"])
def test_mrar_from_a_one_step_model(small, name: str) -> None:
    trainer = train(small(name))
    assert trainer.rate.peak == 5e-5  # absolute
    assert trainer.batches.group_size == 4
    assert final_pipeline(trainer)("2", num_inference_steps=2, return_intermediates=True).intermediates is not None


@pytest.mark.parametrize(("patch_size", "side"), [(4, 4), (8, 8)])
def test_mrar_with_longer_sequences(
    small, vae: Path, base: Path, large_cache: LatentCache, tmp_path: Path, patch_size: int, side: int
) -> None:
    """16 images of one token each, and 64."""
    changes = {"model.patch_size": patch_size, "schedule.steps": 1, "data.batch_size": 4, "schedule.warmup_steps": 0}
    if side == 8:
        start = save_base(tmp_path / "base", vae, 8)
        changes |= {"model.start_from": start, "data.cache": large_cache.folder, "data.image_size": 32}
    trainer = train(small("transdiff_b_mrar", **changes))
    assert final_pipeline(trainer).condition_encoder.num_images == patch_size**2
    (line,) = (trainer.output / "metrics.jsonl").read_text().splitlines()
    assert f"loss_image_{patch_size**2 - 1}" in line


def test_scale_level_from_a_one_step_model(small) -> None:
    """A group is one image, which every prefix predicts; the pipeline makes one image for each scale."""
    trainer = train(small("digits_scales"))
    assert (trainer.batches.group_size, trainer.batches.groups_per_epoch) == (3, len(trainer.data))
    pipeline = final_pipeline(trainer)
    assert pipeline.condition_encoder.group_sizes == (1, 4, 9)
    assert len(pipeline("2", num_inference_steps=2, return_intermediates=True).intermediates) == 3


@pytest.mark.parametrize(
    ("scales", "patch_size", "words"), [("[1, 2, 4]", 1, "make 21 tokens"), ("[1, 2]", 2, "set patch_size 1")]
)
def test_scales_that_do_not_fit(small, scales: str, patch_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Trainer(small("digits_scales", **{"model.scales": scales, "model.patch_size": patch_size}))


def test_512_px_trains_the_decoder_on_a_finer_grid(small, base: Path, large_cache: LatentCache) -> None:
    config = small("transdiff_l_512", **{"data.cache": large_cache.folder, "data.image_size": 32})
    trainer = Trainer(config)
    encoder = trainer.module.condition_encoder
    trainer.engine.model.train()
    labels = torch.tensor([0, 1])
    assert not torch.equal(encoder(labels).condition, encoder(labels).condition)  # its dropout stays on
    trainer.run()
    old, new = TransDiffPipeline.from_pretrained(base), final_pipeline(trainer)
    unchanged = same(new.condition_encoder, old.condition_encoder)
    assert set(old.condition_encoder.state_dict()) - unchanged == {"class_embedding.weight"}  # other classes
    assert (new.condition_encoder.config.sample_size, new.transformer.config.sample_size) == (4, 8)
    assert trainer.rate.peak == 1e-4
    assert not same(new.transformer, old.transformer)  # all of it was trained
    assert new("2", num_inference_steps=2).images[0].size == (32, 32)


def test_mrar_keeps_the_resolution_it_reads(small, large_cache: LatentCache) -> None:
    with pytest.raises(ConfigError, match="encoder for 4 x 4 latents, the data's are 8 x 8"):
        Trainer(small("transdiff_l_mrar", **{"data.cache": large_cache.folder, "data.image_size": 32}))


@pytest.mark.parametrize("name", ["ddp", "two_nodes"])
def test_accelerate_reads_the_shipped_launch_files(name: str) -> None:
    config = load_config_from_file(str(CONFIGS.parent / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert config.num_processes == 8 * config.num_machines


# --- flow maps ---


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*_flow_map.yaml")))
def test_flow_maps(small, vae: Path, base: Path, tmp_path: Path, name: str) -> None:
    config = load_config([f"--config={CONFIGS / name}.yaml"])
    start = base if config.model.patch_size == 1 else save_base(tmp_path / "mrar", vae, 4, config.model.patch_size)
    changes = {"model.start_from": start, "model.flow_map_layers": 1, "loss.teacher_steps": 3}
    trainer = train(small(name, **changes, mixed_precision="no"))
    pipeline = final_pipeline(trainer)
    assert isinstance(pipeline.scheduler, FlowMapScheduler)
    assert pipeline.recommended_num_inference_steps == 4
    assert trainer.teacher.guidance_scales == [1.3] * config.model.patch_size**2
    assert pipeline("2").images[0].size == (16, 16)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_flow_maps_of_the_published_models(published: PublishedModel) -> None:
    config = load_config([f"--config={CONFIGS / published.folder}_flow_map.yaml"])
    assert config.model.start_from == f"outputs/{published.folder}/pipeline"
    assert (config.model.patch_size, config.data.image_size) == (published.patch_size, published.resolution)
    layers = published.size.decoder_layers
    assert config.model.flow_map_layers == round(layers / 3 - 0.01)


# --- a new class set ---


def test_a_new_class_set_keeps_what_maps(small, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(small("finetune_classes"))
    rows = TransDiffPipeline.from_pretrained(base).condition_encoder.class_embedding.weight
    assert torch.equal(trainer.module.condition_encoder.class_embedding.weight, rows[[2, 3, 0, 5]])
    assert "classes: 3 of 3 kept" in capsys.readouterr().out
    trainer.run()
    assert final_pipeline(trainer).labels == {"1": 0, "2": 1, "10": 2}


def test_by_id_and_new(small, base: Path) -> None:
    rows = TransDiffPipeline.from_pretrained(base).condition_encoder.class_embedding.weight
    for choice, expected in (("by_id", rows[[0, 1, 2, 5]]), ("new", torch.stack([rows[:5].mean(0)] * 3 + [rows[5]]))):
        trainer = Trainer(small("finetune_classes", **{"model.classes": choice}))
        torch.testing.assert_close(trainer.module.condition_encoder.class_embedding.weight, expected)


def test_as_many_classes_but_no_name_in_common_must_be_explained(small, base: Path, vae: Path, tmp_path: Path) -> None:
    pipeline = TransDiffPipeline.from_pretrained(base)
    pipeline.resize_class_embeddings({0: "ant", 1: "bee", 2: "cat"})
    pipeline.save_pretrained(tmp_path / "others")
    with pytest.raises(ConfigError, match="model.classes=by_id if class i is"):
        Trainer(small("finetune_classes", **{"model.start_from": tmp_path / "others"}))


def test_a_run_stands_for_its_pipeline(small, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "pipeline").symlink_to(base)
    named = small("finetune_classes", **{"data.vae": '""', "model.start_from": run})
    assert (named.model.start_from, named.data.vae) == (f"{run}/pipeline", f"{run}/pipeline/vae")


def test_what_is_no_pipeline_to_start_from_is_said(small, base: Path, tmp_path: Path) -> None:
    for folder, words in ((base / "vae", "is a part of a pipeline"), (tmp_path / "missing", "is no folder")):
        with pytest.raises(ConfigError, match=f"model.start_from .*{folder.name} {words}"):
            Trainer(small("finetune_classes", **{"model.start_from": folder}))


def test_what_is_unset_is_taken_from_the_pipeline_to_start_from(small, base: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(half_precision, "slowdown", lambda dtype: 30.0)
    trainer = Trainer(small("finetune_classes", **{"data.vae": '""'}))
    said = capsys.readouterr().out
    expected, made = TransDiffPipeline.from_pretrained(base), trainer.export.pipeline(trainer.module)
    assert "warning: bfloat16 is slow on this processor" in said
    assert "is not the VAE" not in said
    assert trainer.config.data.vae == f"{base}/vae"
    for name in ("drift_scale", "diffusion_scale"):
        assert made.scheduler.config[name] == expected.scheduler.config[name]
    assert made.config.guidance_scale == expected.config.guidance_scale
    assert expected.scheduler.config.drift_scale != 1.0
    assert trainer.preview_config.labels == [0, 1, 2]
    set_ = Trainer(small("finetune_classes", **{"sampling.drift_scale": 0.5, "preview.labels": "[1]"}))
    assert set_.export.pipeline(set_.module).scheduler.config.drift_scale == 0.5
    assert set_.preview_config.labels == [1]


def test_another_vae_than_that_of_the_pipeline_to_start_from_is_pointed_out(
    small, vae: Path, data_config: DataConfig, tmp_path: Path, capsys
) -> None:
    other = AutoencoderKL.from_pretrained(vae)
    other.register_to_config(scaling_factor=0.7)
    other.save_pretrained(tmp_path / "other")
    data = replace(data_config, vae=str(tmp_path / "other"), cache=str(tmp_path / "cache"))
    cache_latents(data)
    Trainer(small("finetune_classes", **{"data.vae": data.vae, "data.cache": data.cache}))
    assert f"warning: data.vae {data.vae} is not the VAE of" in capsys.readouterr().out


def test_a_vae_that_is_nowhere_is_one_line(small) -> None:
    with pytest.raises(DataError, match=r"data.vae 'nowhere/vae' cannot be loaded: .* the Hub cannot be reached"):
        Trainer(small("transdiff_b", **{"data.vae": "nowhere/vae"}))


# --- LoRA ---


def latents(pipeline: TransDiffPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([0, 2], num_inference_steps=2, generator=seeded(), output_type="latent").images


@pytest.mark.parametrize("frozen", ["[]", "[condition_encoder]"])
def test_lora_saves_adapters_alone_and_the_pipeline_reads_them(small, base: Path, frozen: str) -> None:
    changes = {"model.frozen": frozen, "lora.rank": 2, "lora.alpha": 6, "mixed_precision": "no"}
    trainer = train(small("lora", **changes, **{"optimizer.learning_rate": 0.1}))
    assert trainer.module.class_ids.tolist() == [2, 3, 0, 5]
    state = checkpoint_folders(trainer.output)[-1] / "state"
    for file in ("model", "ema"):
        assert all("lora_" in name for name in load_file(state / f"{file}.safetensors"))
    (adapter,) = trainer.output.glob("lora/*.safetensors")
    card = ModelCard.load(trainer.output / "lora" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (str(base), "diffusers")
    assert "lora" in card.data.tags
    assert 'pipe.load_lora_weights("FOLDER")' in card.text
    assert f"--model {base} --lora FOLDER" in card.text
    assert {name.split(".")[0] for name in load_file(adapter)} == (
        {"transformer"} if frozen != "[]" else {"transformer", "condition_encoder"}
    )
    assert not list(trainer.output.rglob("diffusion_pytorch_model.safetensors"))
    pipeline = TransDiffPipeline.from_pretrained(base)
    before = latents(pipeline)
    pipeline.load_lora_weights(adapter.parent)
    with trainer.ema.applied():
        trained = latents(trainer.export.pipeline(trainer.module))
    assert torch.equal(latents(pipeline), trained)
    assert not torch.allclose(before, trained)


def test_a_lora_run_resumes_exactly(small, tmp_path: Path) -> None:
    changes = {"schedule.steps": 4, "checkpoints.every": 2, "checkpoints.keep": 9, "lora.rank": 2}
    whole = train(small("lora", **changes))
    killed = tmp_path / "killed"
    shutil.copytree(whole.output, killed)
    shutil.rmtree(checkpoint_folders(killed)[-1])
    shutil.rmtree(killed / "lora")
    train(small("lora", **changes, output=killed))
    # tensors rather than bytes: safetensors writes the metadata of a file in any order
    for name in ("lora/pytorch_lora_weights.safetensors", "checkpoints/step-00000004/state/model.safetensors"):
        resumed, straight = load_file(killed / name), load_file(whole.output / name)
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(tensor, straight[key]) for key, tensor in resumed.items())


def test_lora_says_what_it_cannot_do(small, base: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'to_w', which condition_encoder does not have; it has attn.to_k"):
        Trainer(small("lora", **{"lora.targets": "[to_q, to_w]"}))
    for change in ({"model.patch_size": 2}, {"model.scales": "[1, 2]"}):
        with pytest.raises(ConfigError, match="LoRA adapts the sequences of model.start_from"):
            Trainer(small("lora", **change))
    with pytest.raises(ConfigError, match="needs model.start_from"):
        small("transdiff_b", **{"lora.rank": 4})
    pipeline = TransDiffPipeline.from_pretrained(base)
    pipeline.resize_class_embeddings({0: "1", 1: "2"})
    pipeline.save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="10 is no class of model.start_from"):
        Trainer(small("lora", **{"model.start_from": tmp_path / "two"}))


# --- the global batch ---


@pytest.mark.parametrize(("processes", "batch_size", "steps"), [(1, 2, 6), (2, 2, 3), (3, 4, 1), (6, 1, 2)])
def test_accumulation_follows_from_the_global_batch(small, processes: int, batch_size: int, steps: int) -> None:
    config = small("transdiff_b", **{"optimizer.global_batch_size": 12, "data.batch_size": batch_size})
    assert accumulation_steps(config, processes) == steps


@pytest.mark.parametrize(
    ("processes", "batch_size", "words"),
    [(1, 5, "set data.batch_size=4"), (8, 1, "number of processes that divides it"), (2, 12, "data.batch_size=6")],
)
def test_a_global_batch_that_cannot_be_kept_names_the_remedy(
    small, processes: int, batch_size: int, words: str
) -> None:
    config = small("transdiff_b", **{"optimizer.global_batch_size": 12, "data.batch_size": batch_size})
    with pytest.raises(ConfigError, match=words):
        accumulation_steps(config, processes)
