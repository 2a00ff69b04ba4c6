"""The models that ship inside the package, and the command that puts them there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tiny import seeded, tiny_pipeline

from training.bundle import bundle
from training.digits.quality import pooled_pixels
from transdiff_pipelines import (
    DIGITS,
    DIGITS_FLOW_MAP,
    EMOJI,
    FlowMapScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffPipeline,
)
from transdiff_pipelines.attribution import ATTRIBUTION_NAME, attribution
from transdiff_pipelines.generation import load_pipeline
from transdiff_pipelines.loaders.shared_weights import SHARED_NAME


ROOT = Path(__file__).parents[1]
RED, GREEN, BLUE = range(3)
# Emoji whose colour all artists agree on: channels that are strong in it, and those that are weak. In every real
# drawing of them there is a margin of 0.29 or more between the two.
COLOURS = {
    "red heart": ([RED], [GREEN, BLUE]),
    "crab": ([RED], [GREEN, BLUE]),
    "strawberry": ([RED], [GREEN, BLUE]),
    "lemon": ([RED, GREEN], [BLUE]),
    "baby chick": ([RED, GREEN], [BLUE]),
    "dolphin": ([BLUE], [RED]),
}


@pytest.mark.parametrize(("folder", "limit"), [(DIGITS, 10e6), (DIGITS_FLOW_MAP, 3e6), (EMOJI, 20e6)])
def test_it_is_small(folder, limit):
    assert sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) < limit


def recognised(pipe, **settings) -> float:
    """By a classifier of the real digits; a few steps are enough for that, quality.py measures properly."""
    pipe.set_progress_bar_config(disable=True)
    labels = np.arange(100) % 10
    images = pipe(labels.tolist(), generator=seeded(), output_type="np", **settings).images
    real = load_digits()
    recogniser = SVC(gamma=0.001).fit(real.data, real.target)
    return (recogniser.predict(pooled_pixels(images)) == labels).mean()


def test_its_digits_are_recognised():
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
    assert recognised(pipe, num_inference_steps=12) >= 0.95


class TestFlowMap:
    @pytest.mark.parametrize("settings", [{}, {"num_inference_steps": 1}], ids=str)
    def test_its_digits_are_recognised(self, settings):
        assert recognised(TransDiffPipeline.from_pretrained(DIGITS_FLOW_MAP), **settings) >= 0.95

    def test_the_command_line_knows_it_by_name(self):
        pipe = load_pipeline("digits-flow-map", device="cpu")
        assert (type(pipe.scheduler), pipe.recommended_num_inference_steps) == (FlowMapScheduler, 4)

    def test_a_folder_of_its_name_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        tiny_pipeline().save_pretrained("digits-flow-map")
        assert load_pipeline("digits-flow-map", device="cpu").scheduler.config._class_name != "FlowMapScheduler"

    @pytest.mark.parametrize("pipeline", [TransDiffPipeline, TransDiffImg2ImgPipeline])
    @pytest.mark.parametrize(
        "dtype", [{}, {"dtype": torch.float16}, {"dtype": {"vae": torch.float32, "default": torch.float16}}], ids=str
    )
    def test_shared_weights_are_those_of_the_other_model(self, pipeline, dtype):
        pipe, teacher = (pipeline.from_pretrained(folder, **dtype) for folder in (DIGITS_FLOW_MAP, DIGITS))
        for name in ("condition_encoder", "vae"):
            found, expected = (getattr(owner, name).state_dict() for owner in (pipe, teacher))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
            assert getattr(pipe, name).dtype == getattr(teacher, name).dtype

    def test_a_component_of_the_callers_own_is_taken(self):
        vae = TransDiffPipeline.from_pretrained(DIGITS).vae
        assert TransDiffPipeline.from_pretrained(DIGITS_FLOW_MAP, vae=vae).vae is vae

    @pytest.mark.filterwarnings("ignore")
    def test_saved_it_is_whole(self, tmp_path):
        TransDiffPipeline.from_pretrained(DIGITS_FLOW_MAP).save_pretrained(tmp_path)
        assert not (tmp_path / SHARED_NAME).exists()
        assert TransDiffPipeline.from_pretrained(tmp_path).transformer.config.num_flow_map_layers > 0

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"vae": "nowhere"}, "shares the vae of nowhere.*copy both"),
            ({"vae": "../digits"}, "expected one of condition_encoder, vae with the name of a folder"),
            ({"scheduler": "digits"}, "'scheduler': 'digits'"),
            ({"vae": 3}, "'vae': 3"),
        ],
    )
    def test_weights_that_are_not_there_are_named(self, tmp_path, entries, message):
        folder = tmp_path / "copy"
        shutil.copytree(DIGITS_FLOW_MAP, folder)
        (folder / SHARED_NAME).write_text(json.dumps(entries))
        with pytest.raises(OSError, match=message):
            TransDiffPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def emoji():
    pipe = TransDiffPipeline.from_pretrained(EMOJI)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn(emoji):
    """By name, four pictures of each in [0, 1]: the first ones of their sequences, to be done sooner."""
    names = [name for name in COLOURS for _ in range(4)]
    images = emoji(names, num_inference_steps=6, num_ar_steps=1, generator=seeded(), output_type="np").images
    return {name: images[4 * number : 4 * number + 4] for number, name in enumerate(COLOURS)}


class TestEmoji:
    """What can be told without the drawings that judge it: `training.emoji.quality` measures it by these."""

    def test_its_classes_are_all_that_the_six_sets_share(self, emoji):
        assert len(emoji.labels) == 1051
        assert list(emoji.labels) == sorted(emoji.labels)
        for count in (60, 200):
            lines = (ROOT / f"training/emoji/classes_{count}.txt").read_text(encoding="utf-8").splitlines()
            assert {line for line in lines if not line.startswith("#")} <= set(emoji.labels)
        assert (emoji.condition_encoder.num_images, emoji.image_side) == (4, 64)

    def test_its_pictures_are_on_white(self, drawn):
        for name, images in drawn.items():
            corners = images[:, [0, 1, 2, -3, -2, -1]][:, :, [0, 1, 2, -3, -2, -1]]
            assert corners.mean() > 0.9, name
            assert images.min() < 0.6, name

    @pytest.mark.parametrize("name", COLOURS)
    def test_its_pictures_have_the_colour_of_what_they_show(self, drawn, name):
        """With a random decoder or a random encoder the margin is 0.2 at most, and the dolphin is not blue."""
        ink = drawn[name][drawn[name].min(axis=-1) < 0.8].mean(axis=0)
        strong, weak = COLOURS[name]
        assert ink[strong].min() > ink[weak].max() + 0.25, ink

    def test_pictures_of_one_class_are_more_alike_than_those_of_two(self, drawn):
        """The ratio of their squared distances is 0.5 for real drawings, and 0.9 or more for random networks."""
        pixels = np.stack(list(drawn.values())).reshape(len(COLOURS), 4, -1)
        distances = np.square(pixels[:, :, None, None] - pixels).mean(axis=-1)  # class, picture, class, picture
        own = np.mean([distances[number, :, number].sum() / (4 * 3) for number in range(len(COLOURS))])
        others = np.mean([distances[i, :, j] for i in range(len(COLOURS)) for j in range(len(COLOURS)) if i != j])
        assert own < 0.8 * others


def test_names_are_the_digits():
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    assert pipe.get_label_ids(["0", "9"]) == [0, 9]
    assert pipe.condition_encoder.num_images == 4


@pytest.mark.filterwarnings("ignore")
def test_bundling_keeps_the_pipeline_and_forgets_the_place(tmp_path):
    model, output = tmp_path / "trained", tmp_path / "package" / "digits"
    output.mkdir(parents=True)
    (output / "old.txt").write_text("from the model before")
    tiny_pipeline().save_pretrained(model)
    TransDiffPipeline.from_pretrained(model).save_pretrained(model)  # now its configs name the folder
    bundle(model, "digits", output)
    assert not (output / "old.txt").exists()
    assert (output / ATTRIBUTION_NAME).read_text() == attribution("digits") + "\n"
    assert list(output.parent.iterdir()) == [output]
    for config in output.rglob("*.json"):
        assert str(tmp_path) not in config.read_text()
    assert json.loads((output / "model_index.json").read_text())["guidance_scale"] == 1.3
    trained = TransDiffPipeline.from_pretrained(model).transformer.state_dict()
    for name, weight in TransDiffPipeline.from_pretrained(output).transformer.state_dict().items():
        expected = trained[name].half().float()
        assert torch.equal(weight, expected), name


@pytest.mark.filterwarnings("ignore")
def test_bundling_beside_a_teacher_stores_common_weights_once(tmp_path):
    teacher, model, output = (tmp_path / name for name in ("package/digits", "trained", "package/student"))
    pipe = tiny_pipeline()
    pipe.save_pretrained(model)
    bundle(model, "digits", teacher)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1.0)
    pipe.save_pretrained(model)
    bundle(model, "digits-flow-map", output)
    assert json.loads((output / SHARED_NAME).read_text()) == {"condition_encoder": "digits", "vae": "digits"}
    assert [file.parent.name for file in output.rglob("*.safetensors")] == ["transformer"]
    loaded = TransDiffPipeline.from_pretrained(output)
    for name in ("condition_encoder", "vae", "transformer"):
        weights = getattr(pipe, name).state_dict()
        assert all(
            torch.equal(value, weights[key].half().float())
            for key, value in getattr(loaded, name).state_dict().items()
        )
    for name in ("condition_encoder", "vae"):
        parameter = next(getattr(pipe, name).parameters())
        with torch.no_grad():
            parameter.add_(1.0)
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match="no weights in common"):
        bundle(model, "digits-flow-map", output)
    assert (output / SHARED_NAME).is_file()
    assert {folder.name for folder in output.parent.iterdir()} == {"digits", "student"}  # nothing half-written
