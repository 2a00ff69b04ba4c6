"""Conversion of the authors' checkpoints: what decides the configuration, where weights go, what is refused."""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from transdiff_pipelines import (
    ARConditionEncoder,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
    convert_original_checkpoint,
)
from transdiff_pipelines.data import imagenet_id2label
from transdiff_pipelines.loaders import download_original, save_converted, single_file
from transdiff_pipelines.loaders.original_checkpoint import DECODER, ENCODER, key_table, match_published, read_configs
from transdiff_pipelines.presets import ORIGINAL_REPOSITORY, PUBLISHED, PublishedModel


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
ONE_STEP, MRAR, LARGE, VAE = (
    GOLDEN / f"{name}.checkpoint-last.pth" for name in ("one_step_256", "mrar_256", "one_step_512", "vae")
)


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def convert(checkpoint: Path = ONE_STEP, vae: Any = VAE, num_attention_heads: int | None = 2, **kwargs):
    return convert_original_checkpoint(checkpoint, vae, num_attention_heads=num_attention_heads, **kwargs)


@pytest.fixture(scope="module")
def mrar() -> TransDiffPipeline:
    pipe = convert(MRAR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copy a released file with a change made to its content."""

    def edit(source: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
        content = load(source)
        change(content)
        path = tmp_path / f"edited-{source.name}"
        torch.save(content, path)
        return path

    return edit


# Configuration


@pytest.mark.parametrize(
    ("path", "patch_size", "layers", "sample_size"), [(ONE_STEP, 1, 4, 16), (MRAR, 2, 4, 16), (LARGE, 1, 2, 32)]
)
def test_shapes_decide_the_configuration(path: Path, patch_size: int, layers: int, sample_size: int):
    assert load(path)["args"].model == "transdiff_base", "the recorded command line must be misleading"
    pipe = convert(path)
    encoder, transformer = pipe.condition_encoder.config, pipe.transformer.config
    assert (encoder.num_classes, encoder.in_channels, encoder.num_class_tokens) == (10, 4, 64)
    assert (encoder.patch_size, encoder.num_layers, encoder.sample_size) == (patch_size, layers, 16)
    assert (transformer.num_layers, transformer.sample_size) == (layers // 2, sample_size)
    assert transformer.cross_attention_dim == encoder.num_attention_heads * encoder.attention_head_dim == 32
    assert pipe.vae.config.block_out_channels == [32, 32, 64, 64, 64]
    assert pipe.vae.config.scaling_factor == 0.2325
    assert not pipe.condition_encoder.training
    assert not pipe.transformer.training


def released_shapes(model: PublishedModel) -> dict[str, torch.Tensor]:
    """The weights of a published model in the released layout, without memory."""
    with torch.device("meta"):
        parts = {
            ENCODER: ARConditionEncoder(**model.encoder_config()),
            DECODER: TransDiffTransformer2DModel(**model.transformer_config()),
        }
        ours = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
        weights = {}
        for row in key_table(model.size.encoder_layers, model.size.decoder_layers):
            whole = torch.cat([ours[target] for target in row.targets])
            last_rows = [1] * (len(row.sources) - 1)
            pieces = whole.split([len(whole) - sum(last_rows), *last_rows])
            weights.update(zip(row.sources, pieces, strict=True))
    return weights


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_each_published_model_is_recognised_by_its_shapes(model: PublishedModel):
    encoder, transformer = read_configs(released_shapes(model), None, "checkpoint-last.pth")
    assert encoder == model.encoder_config() | {"mlp_ratio": 4.0}
    assert transformer == model.transformer_config() | {"mlp_ratio": 4.0}
    assert match_published(encoder, transformer) is model


def test_a_checkpoint_of_no_published_shape_gets_neutral_settings_and_no_names(mrar: TransDiffPipeline):
    assert mrar.config.guidance_scale == 1.0
    assert mrar.scheduler.config.drift_scale == mrar.scheduler.config.diffusion_scale == 1.0
    assert mrar.config.id2label is None


def test_a_preset_lends_its_settings_to_models_of_its_kind():
    pipe = convert(MRAR, preset="transdiff_l_mrar")
    assert pipe.config.guidance_scale == 1.30
    assert (pipe.scheduler.config.drift_scale, pipe.scheduler.config.diffusion_scale) == (0.925, 0.95)


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ("transdiff_l", "images in a sequence is 4, transdiff_l has 1"),
        ("transdiff_l_512", "latent size is 16, transdiff_l_512 has 32"),
        ("transdiff_xl", "'transdiff_xl' is not a published model"),
    ],
)
def test_a_preset_that_contradicts_the_shapes_is_refused(preset: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        convert(MRAR, preset=preset)


def test_a_preset_of_another_published_width_is_refused():
    model = PUBLISHED["transdiff_b"]
    with pytest.raises(ValueError, match="width is 768, transdiff_l has 1024"):
        match_published(model.encoder_config(), model.transformer_config(), "transdiff_l")


def test_heads_must_be_told_for_an_unknown_width():
    with pytest.raises(ValueError, match="width 32, .* pass num_attention_heads"):
        convert(num_attention_heads=None)


@pytest.mark.parametrize("heads", [0, 3])
def test_impossible_head_counts_are_refused(heads: int):
    with pytest.raises(ValueError, match=f"num_attention_heads {heads} does not divide the width 32"):
        convert(num_attention_heads=heads)


def test_thousand_classes_are_imagenets(edited):
    def enlarge(content):
        content["model_ema"]["class_emb.weight"] = torch.randn(1000, 32)

    assert convert(edited(ONE_STEP, enlarge)).config.id2label == imagenet_id2label()


# Weights


def test_fused_attention_is_cut_into_queries_keys_and_values(mrar: TransDiffPipeline):
    weights = load(MRAR)["model_ema"]
    for source, attention in (
        ("encoder_blocks.1.attn", mrar.condition_encoder.transformer_blocks[1].attn),
        ("diffdecoder.net.res_blocks.1.attn1", mrar.transformer.transformer_blocks[1].attn1),
    ):
        for kind in ("weight", "bias"):
            parts = [getattr(projection, kind) for projection in (attention.to_q, attention.to_k, attention.to_v)]
            assert torch.equal(torch.cat(parts), weights[f"{source}.qkv.{kind}"].float())


def test_the_null_embedding_is_the_last_class(mrar: TransDiffPipeline):
    weights = load(MRAR)["model_ema"]
    embedding = mrar.condition_encoder.class_embedding.weight
    assert torch.equal(embedding[:-1], weights["class_emb.weight"].float())
    assert torch.equal(embedding[-1:], weights["fake_latent"].float())


@pytest.mark.parametrize("missing", [lambda content: content.pop("model_ema"), lambda c: c.update(model_ema=None)])
def test_averaged_weights_are_preferred_and_the_raw_ones_the_fallback(edited, missing):
    content = load(ONE_STEP)
    raw, averaged = content["model"]["mask_token"].float(), content["model_ema"]["mask_token"].float()
    assert not torch.equal(raw, averaged)
    assert torch.equal(convert(ONE_STEP).condition_encoder.mask_token, averaged)
    assert torch.equal(convert(edited(ONE_STEP, missing)).condition_encoder.mask_token, raw)


def test_the_pipeline_does_not_depend_on_the_file_any_more(tmp_path: Path):
    path = tmp_path / "checkpoint-last.pth"
    path.write_bytes(ONE_STEP.read_bytes())
    # float16 is the type in the file, so that nothing is converted.
    mask_token = convert(path, dtype=torch.float16).condition_encoder.mask_token
    before = mask_token.clone()
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(mask_token, before)


# Refusals


class Intruder:
    """Unpickled by plain pickle, this makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["args", "optimizer"])
def test_code_in_a_pickle_is_refused_and_not_run(edited, tmp_path: Path, place: str):
    trace = tmp_path / "trace"
    path = edited(ONE_STEP, lambda content: content.update({place: Intruder(trace)}))
    with pytest.raises(ValueError, match="objects other than tensors, plain containers and argparse.Namespace"):
        convert(path)
    assert not trace.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_other_classes_in_the_command_line_record_are_refused(edited):
    path = edited(ONE_STEP, lambda content: setattr(content["args"], "output_dir", Path("out")))
    with pytest.raises(ValueError, match="cannot be read as a released checkpoint"):
        convert(path)


@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("which", ["checkpoint", "vae"])
def test_a_truncated_file_is_refused(tmp_path: Path, which: str, fraction: float):
    source = {"checkpoint": ONE_STEP, "vae": VAE}[which]
    content = source.read_bytes()
    path = tmp_path / "checkpoint-last.pth"
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=f"{path} cannot be read as a released checkpoint.* cut short"):
        convert(**{which: path})


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("# A model\n")
    with pytest.raises(ValueError, match="cannot be read as a released checkpoint"):
        convert(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        convert(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        convert(ONE_STEP, tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (torch.zeros(2), "holds a Tensor; expected a dict"),
        ({"state_dict": {}}, "expected 'model_ema' or 'model', found state_dict"),
        ({}, "found nothing"),
        ({"model": {"epoch": 3}}, "not a dict of tensors"),
    ],
)
def test_a_dictionary_of_something_else_is_refused(tmp_path: Path, content: Any, complaint: str):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=complaint):
        convert(path)


def test_swapped_files_are_told():
    with pytest.raises(ValueError, match="is a VAE, not a TransDiff checkpoint; are the two arguments swapped"):
        convert(VAE, ONE_STEP)
    with pytest.raises(ValueError, match="is a TransDiff checkpoint, not a VAE; are the two arguments swapped"):
        convert(ONE_STEP, MRAR)


def drop(name: str) -> Callable[[dict], None]:
    return lambda weights: weights.pop(name)


def put(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop("fake_latent"), "1 missing: fake_latent"),
        (drop("encoder_blocks.0.attn.qkv.bias"), "1 missing: encoder_blocks.0.attn.qkv.bias"),
        (drop("diffdecoder.net.cond_embed.weight"), "1 missing: diffdecoder.net.cond_embed.weight"),
        (put("encoder_blocks.0.attn.q_norm.weight", 16), "1 unknown: encoder_blocks.0.attn.q_norm.weight"),
        (put("encoder_blocks.9.norm1.weight", 32), "1 unknown: encoder_blocks.9.norm1.weight"),
        (put("pos_embed", 1, 256, 32), "1 unknown: pos_embed"),
        (put("encoder_norm.weight", 33), r"1 weights whose shape .*: encoder_norm.weight \(33,\)"),
        (put("encoder_blocks.0.attn.qkv.weight", 97, 32), r"encoder_blocks.0.attn.qkv.weight \(97, 32\)"),
        (put("encoder_blocks.3.mlp.fc1.weight", 64, 32), r"encoder_blocks.3.mlp.fc1.weight \(64, 32\)"),
        (put("fake_latent", 2, 32), r"class_emb.weight \(10, 32\), fake_latent \(2, 32\)"),
        (put("mask_token", 1, 64, 32), r"mask_token \(1, 64, 32\)"),
        (put("z_proj.weight", 32, 12), "makes? 3 latents in an AR patch, which is no square number"),
        (put("diffdecoder.net.diffusion_pos_embed_learned", 1, 255, 32), "255 latent positions"),
        (put("class_emb.weight", 10), r"class_emb.weight has shape \(10,\); expected 2 or more dimensions"),
        (put("mask_token"), r"mask_token \(\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused_by_name(edited, change, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        convert(edited(ONE_STEP, lambda content: change(content["model_ema"])))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop("quant_conv.bias"), "1 missing: quant_conv.bias"),
        (put("loss.logvar", 1), "1 unknown: loss.logvar"),
        (put("encoder.mid.attn_1.q.weight", 64, 64, 3, 3), r"encoder.mid.attn_1.q.weight \(64, 64, 3, 3\)"),
        (
            put("decoder.up.4.block.0.conv1.weight", 32, 64, 3, 3),
            r"decoder.up.4.block.0.conv1.weight \(32, 64, 3, 3\)",
        ),
    ],
)
def test_a_vae_that_does_not_fit_is_refused_by_name(edited, change, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        convert(vae=edited(VAE, lambda content: change(content["model"])))


# Saving and loading


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def generate(pipe: TransDiffPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([3, 7], 1.4, num_inference_steps=2, generator=generator, output_type="latent").images


def test_a_saved_pipeline_loads_to_the_same_one(tmp_path: Path, mrar: TransDiffPipeline):
    folder = save_converted(mrar, tmp_path / "new" / "folder")
    loaded = TransDiffPipeline.from_pretrained(folder)
    assert torch.equal(generate(loaded), generate(mrar))
    assert loaded.config.guidance_scale == mrar.config.guidance_scale
    assert [path.name for path in folder.parent.iterdir()] == ["folder"], "temporary files were left"


def test_half_precision_is_stored_in_half_the_space(tmp_path: Path):
    full, half = (convert(MRAR, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for pipe, name in ((full, "full"), (half, "half")):
        save_converted(pipe, tmp_path / name)
    assert folder_bytes(tmp_path / "half") == pytest.approx(folder_bytes(tmp_path / "full") / 2, rel=0.05)
    assert {half.condition_encoder.dtype, half.transformer.dtype, half.vae.dtype} == {torch.bfloat16}
    weight = full.transformer.proj_out.weight
    assert torch.equal(half.transformer.proj_out.weight, weight.bfloat16())


def test_a_folder_in_use_is_left_alone(tmp_path: Path, mrar: TransDiffPipeline):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; remove it, or name another output folder"):
        save_converted(mrar, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, mrar: TransDiffPipeline, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(mrar.vae), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_converted(mrar, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_from_single_file_is_the_same_conversion(mrar: TransDiffPipeline):
    loaded = TransDiffPipeline.from_single_file(MRAR, vae=VAE, num_attention_heads=2, preset="transdiff_h_mrar")
    assert torch.equal(generate(loaded), generate(convert(MRAR, preset="transdiff_h_mrar")))
    assert loaded.config.guidance_scale == 1.28
    half = TransDiffPipeline.from_single_file(MRAR, vae=mrar.vae, num_attention_heads=2, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert half.vae is mrar.vae


def test_the_vae_may_be_a_diffusers_folder(tmp_path: Path, mrar: TransDiffPipeline):
    mrar.vae.save_pretrained(tmp_path)
    vae = TransDiffPipeline.from_single_file(MRAR, vae=tmp_path, num_attention_heads=2).vae
    assert isinstance(vae, AutoencoderKL)
    latent = torch.randn(1, 4, 2, 2)
    assert torch.equal(vae.decode(latent).sample, mrar.vae.decode(latent).sample)


def test_the_vae_of_another_model_is_refused():
    other = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=16)
    with pytest.raises(ValueError, match="latent channels"):
        convert(vae=other)


def test_links_to_the_hub_are_downloaded(monkeypatch):
    asked = []

    def download(repo: str, name: str) -> Path:
        asked.append((repo, name))
        return VAE if name.startswith("vae/") else MRAR

    monkeypatch.setattr(single_file, "hf_hub_download", download)
    link = f"https://huggingface.co/{ORIGINAL_REPOSITORY}/blob/main"
    TransDiffPipeline.from_single_file(
        f"{link}/transdiff_l_mrar/checkpoint-last.pth", vae=f"{link}/vae/checkpoint-last.pth", num_attention_heads=2
    )
    assert asked == [
        (ORIGINAL_REPOSITORY, "transdiff_l_mrar/checkpoint-last.pth"),
        (ORIGINAL_REPOSITORY, "vae/checkpoint-last.pth"),
    ]
    with pytest.raises(ValueError, match="no link to a file on the Hub"):
        TransDiffPipeline.from_single_file("https://huggingface.co/zhendch", vae=VAE)


# The authors' repository


def test_from_pretrained_on_the_authors_repository_says_to_convert():
    command = r"transdiff convert --repo zhendch/Transdiff --model transdiff_l_mrar --output FOLDER"
    with pytest.raises(OSError, match=command) as raised:
        TransDiffPipeline.from_pretrained("zhendch/Transdiff")
    assert all(folder in str(raised.value) for folder in PUBLISHED)


@pytest.mark.parametrize("name", ["checkpoint-last.pth", "transdiff_b/checkpoint-last.pth"])
def test_from_pretrained_on_a_folder_of_released_files_says_to_convert(tmp_path: Path, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(
        OSError, match=rf"\({name}\), not a diffusers pipeline. Convert one first:\s+transdiff convert"
    ):
        TransDiffPipeline.from_pretrained(tmp_path)


def test_from_pretrained_on_anything_else_fails_as_in_diffusers(tmp_path: Path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        TransDiffPipeline.from_pretrained(tmp_path)


def test_download_of_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="'transdiff_xl' is not a published model"):
        download_original("transdiff_xl")


class ReleasedFiles(BaseHTTPRequestHandler):
    """The two requests that downloading a file from the Hub makes."""

    files = {
        "/someone/mirror/resolve/main/transdiff_b_mrar/checkpoint-last.pth": MRAR,
        "/someone/mirror/resolve/main/vae/checkpoint-last.pth": VAE,
    }

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        file = self.files.get(self.path)
        content = file.read_bytes() if file else b""
        self.send_response(200 if file else 404)
        self.send_header("Content-Length", str(len(content)))
        if file:
            self.send_header("ETag", f'"{file.stem}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_model_is_converted_straight_from_a_hub(tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), ReleasedFiles)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The address of the Hub is read on import, hence another process.
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    hub |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "no_proxy": "127.0.0.1"}
    program = "from transdiff_cli import main; main()"
    arguments = "convert --repo someone/mirror --model transdiff_b_mrar --num-attention-heads 2"
    preset = ["--preset", "transdiff_b_mrar", "--output", str(tmp_path / "out")]
    try:
        subprocess.run(
            [sys.executable, "-c", program, *arguments.split(), *preset],
            env=os.environ | hub,
            check=True,
        )
    finally:
        server.shutdown()
        server.server_close()
    pipe = TransDiffPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(generate(pipe), generate(convert(MRAR, preset="transdiff_b_mrar")))
    assert pipe.config.guidance_scale == 1.30
