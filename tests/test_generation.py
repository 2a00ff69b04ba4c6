"""The settings of an image: what they accept, what an image carries, and drawing by them."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny import seeded, tiny_pipeline

from transdiff_pipelines.generation import PNG_KEY, GenerationSettings, draw, make_scheduler


SETTINGS = GenerationSettings(
    labels=(4, 1),
    model="some folder/it's",
    count=2,
    seed=7,
    guidance_scale=(1.0, 1.5, 2.0, 2.5),
    num_inference_steps=2,
    scheduler="sde-multistep",
    drift_scale=0.8,
    diffusion_scale=0.0,
    dtype="bfloat16",
    batch_size=3,
)


def png(path: Path, text: str | None) -> Path:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(PNG_KEY, text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


def test_an_image_keeps_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=SETTINGS.png_info())
    assert GenerationSettings.from_image(path) == SETTINGS
    with Image.open(path) as image:
        assert GenerationSettings.from_image(image) == SETTINGS


def test_command_line_is_quoted_for_a_shell() -> None:
    words = shlex.split(SETTINGS.command_line())
    assert words[:4] == ["transdiff", "generate", "4", "1"]
    assert words[words.index("--model") + 1] == "some folder/it's"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--guidance-scale"] == ["1.0,1.5,2.0,2.5"]
    assert words[words.index("--diffusion-scale") + 1] == "0.0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["carries no settings"]),
        ("{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ("9" * 5000, ["not JSON"]),
        ("[1]", ["no labels"]),
        ("{}", ["no labels"]),
        ('{"labels": [1], "sharpness": 2, "version": "9.0.0"}', ["'sharpness'", "'9.0.0'", "install"]),
    ],
)
def test_images_without_settings_to_follow(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = png(tmp_path / "image.png", text)
    with pytest.raises(ValueError, match="image.png") as error:
        GenerationSettings.from_image(path)
    for word in words:
        assert word in str(error.value)


WRONG = [
    ("labels", []),
    ("labels", "3"),
    ("labels", 3),
    ("labels", [-1]),
    ("labels", [True]),
    ("labels", [1.0]),
    ("labels", [[1]]),
    ("labels", [0] * 100_001),
    ("model", ""),
    ("model", 3),
    ("model", "a\x1b[2Jb"),
    ("model", "a" * 5000),
    ("count", 0),
    ("count", 10**9),
    ("count", None),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 0.5),
    ("guidance_scale", -1),
    ("guidance_scale", float("nan")),
    ("guidance_scale", float("inf")),
    ("guidance_scale", 10**400),
    ("guidance_scale", "2"),
    ("guidance_scale", []),
    ("guidance_scale", [1, None]),
    ("guidance_scale", [[1]]),
    ("num_inference_steps", 0),
    ("num_inference_steps", 10**12),
    ("scheduler", "magic"),
    ("scheduler", ["heun"]),
    ("scheduler", {}),
    ("drift_scale", -0.1),
    ("drift_scale", [1]),
    ("diffusion_scale", "1"),
    ("diffusion_scale", True),
    ("dtype", "int8"),
    ("dtype", None),
    ("batch_size", 0),
    ("version", "\n"),
    ("version", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{value!r:.12}" for name, value in WRONG])
def test_values_of_a_stranger_are_checked(tmp_path: Path, name: str, value: object) -> None:
    path = png(tmp_path / "image.png", json.dumps(asdict(SETTINGS) | {"count": 2, name: value}))
    with pytest.raises(ValueError, match=rf"settings in .*image\.png are wrong: .*({name}|images)") as error:
        GenerationSettings.from_image(path)
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_picture_above_pillows_limit_keeps_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the text is read: 20,000 images of 32 pixels in one grid are more than Pillow wants to open."""
    settings = GenerationSettings(labels=(3,), count=4)
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png", pnginfo=settings.png_info())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    assert GenerationSettings.from_image(tmp_path / "large.png") == settings


def test_files_that_are_no_png(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "image.jpg")
    (tmp_path / "empty.png").touch()
    for name in ("image.jpg", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} is not a PNG"):
            GenerationSettings.from_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        GenerationSettings.from_image(tmp_path / "missing.png")


def test_image_i_has_the_label_and_seed_of_its_place() -> None:
    singles = [SETTINGS.image(i) for i in range(SETTINGS.num_images)]
    assert [(single.labels, single.count, single.seed) for single in singles] == [
        ((4,), 1, 7),
        ((4,), 1, 8),
        ((1,), 1, 9),
        ((1,), 1, 10),
    ]


def test_draw_calls_the_pipeline_with_the_settings_and_gives_its_scheduler_back() -> None:
    pipe = tiny_pipeline()
    own = pipe.scheduler
    settings = replace(SETTINGS, batch_size=4)
    drawn = list(draw(pipe, settings))
    assert pipe.scheduler is own

    pipe.scheduler = make_scheduler(own, "sde-multistep", 0.8, 0.0)
    expected = pipe([4, 4, 1, 1], [1.0, 1.5, 2.0, 2.5], 2, [seeded(seed) for seed in (7, 8, 9, 10)]).images
    for image, twin in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(twin))


def test_a_callback_that_fails_leaves_the_scheduler_in_place() -> None:
    pipe = tiny_pipeline()
    own = pipe.scheduler

    def fail(*_: object) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(draw(pipe, SETTINGS, callback_on_step_end=fail))
    assert pipe.scheduler is own


def test_resolved_settings_draw_the_same() -> None:
    pipe = tiny_pipeline()
    open_settings = GenerationSettings(labels=(1,), num_inference_steps=2)
    settings = open_settings.resolved(pipe)
    assert (settings.guidance_scale, settings.scheduler) == (1.3, "euler-maruyama")
    assert (settings.drift_scale, settings.diffusion_scale) == (0.9, 0.95)
    (image,), (twin,) = draw(pipe, open_settings), draw(pipe, settings)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(twin))


def test_a_scheduler_from_elsewhere_is_left_to_the_model() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = type("Another", (type(pipe.scheduler),), {}).from_config(pipe.scheduler.config)
    settings = GenerationSettings(labels=(1,)).resolved(pipe)
    assert (settings.scheduler, settings.drift_scale) == (None, None)


def test_make_scheduler_errors() -> None:
    own = tiny_pipeline().scheduler
    with pytest.raises(ValueError, match="'magic' is unknown; choose one of euler-maruyama"):
        make_scheduler(own, "magic")
    with pytest.raises(ValueError, match="drift_scale is for the SDE samplers .*FlowMatchHeun"):
        make_scheduler(own, "heun", drift_scale=0.5)
    assert make_scheduler(own) is own
