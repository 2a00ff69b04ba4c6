"""`transdiff generate --lora`: one adapter and several, their weights, and the image drawn again from its PNG."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_one_line_error, run
from peft import LoraConfig
from PIL import Image, PngImagePlugin
from tiny import seeded, tiny_pipeline
from typer.testing import Result

from transdiff_pipelines import TransDiffPipeline, generation
from transdiff_pipelines.generation import PNG_KEY, GenerationSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save_adapter(folder: str, component: str = "transformer", seed: int = 0) -> None:
    model = getattr(tiny_pipeline(), component)
    torch.manual_seed(seed)  # peft draws the adapter from the global generator
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False))
    TransDiffPipeline.save_lora_weights(folder, **{f"{component}_lora_layers": model})


def generate(model: str, *arguments: object) -> Result:
    return run("generate", 1, "--model", model, "--steps", 2, "--device", "cpu", *arguments)


def drawn_again(path: str) -> Result:
    return run("generate", "--from", path, "--device", "cpu", "--output", "again.png")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_adapters_draw_as_they_do_in_python(model: str) -> None:
    save_adapter("run/lora")
    save_adapter("encoder", "condition_encoder", seed=1)
    result = generate(model, "--lora", "run", "--lora", "encoder", "--lora-scale", "0.5,2", "--output", "out.png")
    assert result.exit_code == 0, result.output
    assert "LoRA run at 0.5, LoRA encoder at 2, float32" in result.stdout

    pipe = TransDiffPipeline.from_pretrained(model)
    pipe.load_lora_weights("run", adapter_name="first")
    pipe.load_lora_weights("encoder", adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    image = pipe(1, num_inference_steps=2, generator=seeded()).images[0]
    np.testing.assert_array_equal(pixels("out.png"), np.asarray(image))
    assert generate(model, "--output", "plain.png").exit_code == 0
    assert (pixels("plain.png") != pixels("out.png")).any()


def test_a_png_is_drawn_again_with_its_adapters(model: str) -> None:
    save_adapter("first")
    save_adapter("second", seed=1)
    options = ["--lora", "first", "--lora", "second", "--lora-scale", "1,-0.5"]
    assert generate(model, *options, "--output", "out.png").exit_code == 0
    stored = GenerationSettings.from_image("out.png")
    assert (stored.lora, stored.lora_scale) == (("first", "second"), (1.0, -0.5))
    assert len(set(stored.lora_digest)) == 2

    again = drawn_again("out.png")
    assert again.exit_code == 0, again.output
    assert "note:" not in again.stderr
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    command = shlex.split(stored.command_line())
    assert run(*command[1:], "--device", "cpu", "--output", "typed.png").exit_code == 0
    assert Path("typed.png").read_bytes() == Path("out.png").read_bytes()


def test_what_has_become_of_an_adapter_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter("adapter")
    assert generate(model, "--lora", "adapter", "--lora-scale", 0.5, "--output", "out.png").exit_code == 0
    save_adapter("adapter", seed=1)
    changed = drawn_again("out.png")
    assert changed.exit_code == 0, changed.output
    assert "note: out.png was drawn with another LoRA than the one in adapter" in changed.stderr

    save_adapter("moved")
    for file in Path("adapter").iterdir():
        file.unlink()
    Path("adapter").rmdir()
    moved = run("generate", "--from", "out.png", "--lora", "moved", "--device", "cpu", "--output", "moved.png")
    assert "note:" not in moved.stderr
    np.testing.assert_array_equal(pixels("moved.png"), pixels("out.png"))
    assert GenerationSettings.from_image("moved.png").lora_scale == (0.5,)

    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("loaded first"))
    missing = drawn_again("out.png")
    assert missing.exit_code == 1
    assert "error: LoRA adapter does not exist" in missing.stderr
    assert "name its place with --lora" in missing.stderr


def test_errors(model: str) -> None:
    save_adapter("adapter")
    assert_one_line_error(generate(model, "--lora", "adapter", "--lora-scale", "1,2"), "2 value(s) for 1 LoRA")
    assert_one_line_error(generate(model, "--lora-scale", 1), "1 value(s) for 0 LoRA")
    assert_one_line_error(generate(model, "--lora", model), f"LoRA {model}: ", "no file named")
    assert_one_line_error(run("generate", "--model", "adapter"), "holds LoRA adapters", "--lora adapter")
    apart = generate(model, "--lora", "adapter", "other")
    assert apart.exit_code == 2
    assert "--lora adapter --lora other" in " ".join(apart.stderr.split())
    assert generate(model, "--lora", "adapter", "--lora-scale", "much").exit_code == 2
    assert not list(Path().glob("*.png"))


def test_labels_may_follow_an_adapter(model: str) -> None:
    save_adapter("adapter")
    result = run("generate", "--model", model, "--steps", 1, "--lora", "adapter", 3, 4, "--output", "out.png")
    assert result.exit_code == 0, result.output
    assert GenerationSettings.from_image("out.png").labels == (3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora": "adapter"},
        {"lora": [3]},
        {"lora": [["a", 1]]},
        {"lora": ["a\x1b[2Jb"]},
        {"lora": ["a"] * 101},
        {"lora": ["a"], "lora_scale": 1.0},
        {"lora": ["a"], "lora_scale": [1.0, 1.0]},
        {"lora": ["a"], "lora_scale": ["1"]},
        {"lora": ["a"], "lora_scale": [float("nan")]},
        {"lora": ["a"], "lora_scale": [-1001]},
        {"lora": ["a"], "lora_digest": [1]},
        {"lora": ["a"], "lora_digest": ["0", "1"]},
    ],
)
def test_settings_of_a_stranger(wrong: dict, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY, json.dumps({"labels": [1]} | wrong))
    Image.new("RGB", (2, 2)).save("image.png", pnginfo=info)
    with pytest.raises(ValueError, match="settings in image.png are wrong: lora"):
        GenerationSettings.from_image("image.png")
