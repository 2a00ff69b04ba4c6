"""The recogniser of emoji, and the laws that the measures of a model obey."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_encoder, tiny_pipeline, tiny_transformer

from training.data.errors import DataError
from training.emoji import quality, recogniser
from training.emoji.judge import MEASURES, Drawings, Judge, pixels
from training.emoji.recogniser import load_recogniser, new_recogniser, varied_pictures
from training.evaluation import quality as evaluation_quality
from training.experiments import ar_steps, fusion


CLASSES = ["bar", "cross", "disc", "flag", "ring"]
HANDS = ["a", "b", "c", "d", "e", "f"]
SIDE = 32


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a distance is not what these tests are about, and takes most of their time."""
    monkeypatch.setattr(evaluation_quality, "RESAMPLES", 5)


def drawing(name: str, hand: int) -> np.ndarray:
    """A shape on white, `(32, 32, 3)` uint8; hands differ in size and colour."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius, size = np.hypot(x, y), 9 + hand
    ink = {
        "bar": (np.abs(x) < 2) & (np.abs(y) < size),
        "cross": (np.abs(x) < 3) & (np.abs(y) < size) | (np.abs(y) < 3) & (np.abs(x) < size),
        "disc": radius < size,
        "flag": (np.abs(x) < size) & (y < 0) & (y > -size),
        "ring": np.abs(radius - size + 2) < 2,
    }[name]
    image = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    image[ink] = [20 * hand, 100 - 15 * hand, 10 + 30 * hand]
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `training.emoji.render` writes it: of each class one hand is held out, for validation or for test."""
    folder = tmp_path_factory.mktemp("data")
    for label, name in enumerate(CLASSES):
        for hand, letter in enumerate(HANDS):
            split = "train" if hand != label + 1 else ("test", "validation")[label % 2]
            path = folder / split / name / f"{letter}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing(name, hand)).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> recogniser.Recogniser:
    train = Drawings(data, "train")
    model = new_recogniser(train.classes, width=4)
    model.fit(train.images, train.labels, epochs=60)
    model.trained_on = train.digest
    return model


@pytest.fixture(scope="module")
def judge(data: Path, trained: recogniser.Recogniser) -> Judge:
    return Judge(data, "test", trained)


class TestDrawings:
    def test_splits(self, data: Path) -> None:
        train, test = Drawings(data, "train"), Drawings(data, "test", CLASSES)
        assert train.classes == CLASSES
        assert train.images.shape == (25, SIDE, SIDE, 3)
        assert np.bincount(train.labels).tolist() == [5] * 5
        assert [CLASSES[label] for label in test.labels] == ["bar", "disc", "ring"]
        assert test.hands == ["b", "d", "f"]
        np.testing.assert_array_equal(test.images[1], drawing("disc", 3))

    def test_what_does_not_fit(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="training.emoji.render --output"):
            Drawings(tmp_path, "train")
        with pytest.raises(DataError, match="classes that training has not: ring"):
            Drawings(data, "test", ["bar", "disc"])
        for side in (16, 32):
            (tmp_path / "train" / "dot").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(tmp_path / "train" / "dot" / f"{side}.png")
        with pytest.raises(DataError, match="several sizes"):
            Drawings(tmp_path, "train")

    def test_distances_of_pixels_are_root_mean_squares(self) -> None:
        images = np.zeros((3, SIDE, SIDE, 3), dtype=np.uint8)
        images[1] += 10  # everywhere
        images[2, : SIDE // 4] = 100  # in a quarter
        rows = pixels(images)
        assert np.linalg.norm(rows[1] - rows[0]) == pytest.approx(10)
        assert np.linalg.norm(rows[2] - rows[0]) == pytest.approx(50)
        np.testing.assert_allclose(pixels(images / 255), rows)
        with pytest.raises(ValueError, match="16 divides"):
            pixels(np.zeros((1, 24, 24, 3)))


class TestRecogniser:
    def test_it_learns_and_is_saved(self, data: Path, trained: recogniser.Recogniser, tmp_path: Path) -> None:
        train = Drawings(data, "train")
        features, scores = trained.judge(train.images)
        assert (scores.argmax(1) == train.labels).mean() > 0.9
        assert new_recogniser(CLASSES, width=4).judge(train.images)[1].argmax(1).tolist() != train.labels.tolist()
        trained.save(tmp_path / "recogniser.safetensors")
        loaded = load_recogniser(tmp_path / "recogniser.safetensors")
        assert loaded.classes == CLASSES
        np.testing.assert_allclose(loaded.judge(train.images)[0], features)
        # Pictures in [0, 1] are the same pictures.
        np.testing.assert_allclose(loaded.judge(train.images / 255)[1], scores, atol=1e-4)

    def test_a_seed_settles_it_and_touches_no_other_random_numbers(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, again, other = (new_recogniser(CLASSES, width=4, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first.directions, again.directions)
        assert not torch.equal(first.directions, other.directions)

    @pytest.mark.parametrize("contents", [b"", b"no weights", b"\x02\0\0\0\0\0\0\0{}"])
    def test_another_file_is_none(self, contents: bytes, tmp_path: Path) -> None:
        path = tmp_path / "recogniser.safetensors"
        path.write_bytes(contents)
        with pytest.raises(DataError, match="remove it"):
            load_recogniser(path)

    def test_pictures_are_varied_but_not_mirrored(self) -> None:
        """White stays white, and a mark on the left stays on the left, whatever is done to the picture."""
        pictures = torch.ones(200, 3, SIDE, SIDE)
        pictures[:, :, 12:20, 4:10] = 0
        varied = varied_pictures(pictures, torch.Generator().manual_seed(0))
        ink = 1 - varied.mean(1)
        assert varied.shape == pictures.shape
        assert len({round(float(value), 3) for value in ink.sum((1, 2))}) > 150
        assert float(ink[:, :, SIDE // 2 :].abs().max()) < 1e-5
        assert (ink[:, :, : SIDE // 2].amax((1, 2)) > 0.5).all()


class TestMeasures:
    def test_real_drawings(self, judge: Judge) -> None:
        real = judge.measure_real()
        assert set(judge.accuracy) == {"validation", "test"}
        assert 5 * judge.ceiling == pytest.approx(3 * judge.accuracy["test"] + 2 * judge.accuracy["validation"])
        assert real["recognition"] == judge.ceiling > 0.25
        assert real["copies"] <= 0.5
        assert real["closer_than_half"] <= 0.5
        assert real["nearest"] > 0

    def test_training_drawings_are_copies(self, judge: Judge) -> None:
        train = judge.train
        copied = judge.measure(train.images / 255, train.labels)
        assert copied["copies"] == copied["closer_than_half"] == 1
        assert copied["nearest"] == pytest.approx(0, abs=1e-9)
        assert copied["frechet_train"] == pytest.approx(0, abs=1e-3)
        assert copied["precision"] == copied["recall"] == 1
        assert copied["recognition"] > 0.9
        wrong = judge.measure(train.images / 255, (train.labels + 1) % 5)
        assert wrong["recognition"] < 0.1
        assert wrong["feature_variance"] == pytest.approx(copied["feature_variance"])  # classes stay together

    def test_noise_is_none(self, judge: Judge) -> None:
        noise = np.random.default_rng(0).random((8, SIDE, SIDE, 3))
        measured = judge.measure(noise, np.repeat(np.arange(4), 2))
        assert measured["copies"] == 0
        assert measured["nearest"] > 2 * judge.measure_real()["nearest"]

    def test_hands_are_the_sets_of_the_nearest_drawings(self, judge: Judge) -> None:
        train = judge.train
        assert judge.hands(train.images, train.labels).tolist() == train.hands
        shares = judge.share_of_hands(train.images, train.labels)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["a"] == 5 / 25  # no drawing of this hand is held out

    def test_sequences_of_one_hand_and_of_many(self, judge: Judge) -> None:
        """Four sequences of two classes; in the first case each keeps to its hand, in the other each has four."""
        labels = np.repeat([1, 3], 4)
        rows = {label: np.flatnonzero(judge.train.labels == label)[:4] for label in (1, 3)}
        images = judge.train.images / 255
        own = np.stack([images[np.concatenate([rows[1], rows[3]])]] * 4)
        turned = np.stack([images[np.concatenate([np.roll(rows[1], s), np.roll(rows[3], s)])] for s in range(4)])
        same, different = (judge.measure_sequences(sequences, labels) for sequences in (own, turned))
        assert (same["hands"], same["sequence_hands"]) == (4, 1)
        assert (different["hands"], different["sequence_hands"]) == (4, 4)
        assert same["sequence_diversity"] == pytest.approx(0, abs=1e-9)
        assert different["sequence_diversity"] == pytest.approx(different["diversity"])
        one_step = judge.measure_sequences(own[:1], labels)
        assert "sequence_hands" not in one_step
        assert one_step["hands"] == 4

    def test_every_measure_has_a_title(self, judge: Judge) -> None:
        labels = np.repeat(np.arange(4), 4)
        sequences = np.random.default_rng(0).random((2, 16, SIDE, SIDE, 3))
        measured = judge.measure_sequences(sequences, labels).keys() | {"reconstructions"}
        assert measured - {"frechet_held_out_error"} == MEASURES.keys()

    def test_another_recogniser(self, data: Path) -> None:
        with pytest.raises(DataError, match="trained on other classes"):
            Judge(data, "test", new_recogniser(CLASSES[:3], width=4))
        with pytest.raises(DataError, match="trained on other drawings"):
            Judge(data, "test", new_recogniser(CLASSES, width=4))


def saved_pipeline(folder: Path, names: list[str], patch_size: int = 2) -> str:
    parts = {"condition_encoder": tiny_encoder(patch_size, SIDE // 2), "transformer": tiny_transformer(SIDE // 2)}
    tiny_pipeline(id2label=dict(enumerate(names)), **parts).save_pretrained(folder)
    return str(folder)


class TestCommand:
    def test_a_recogniser_alone(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is trained once: the second time its file is read."""
        options = [f"--data={data}", f"--recogniser={tmp_path / 'r.safetensors'}"]
        quality.main([*options, "--epochs=1"])
        first, before = capsys.readouterr().out, (tmp_path / "r.safetensors").read_bytes()
        assert first.startswith("recognised held-out drawings: ")
        assert first.endswith("% of both\n")
        quality.main(options)
        assert capsys.readouterr().out == first
        assert (tmp_path / "r.safetensors").read_bytes() == before

    def test_outputs_are_of_a_model(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            quality.main([f"--data={data}", f"--recogniser={tmp_path / 'r'}", f"--grid={tmp_path / 'a.png'}"])
        assert "name one with --model" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize(("patch_size", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
    def test_a_model(self, data, trained, tmp_path, capsys, patch_size: int, dtype: str) -> None:
        """An untrained one, 1-step and with sequences: recognised by chance, and no copy."""
        trained.save(tmp_path / "r.safetensors")
        model = saved_pipeline(tmp_path / "model", CLASSES, patch_size)
        outputs = [f"--output={tmp_path / 'q.json'}", f"--grid={tmp_path / 'q.png'}"]
        options = [f"--data={data}", f"--recogniser={tmp_path / 'r.safetensors'}", "--split=test", f"--model={model}"]
        quality.main(
            [
                *options,
                *outputs,
                "--num-inference-steps=1",
                "--per-class=4",
                f"--dtype={dtype}",
                "--seeds",
                "3",
                "4",
                "3",
            ]
        )
        result = json.loads((tmp_path / "q.json").read_text())
        assert (result["settings"]["num_inference_steps"], result["settings"]["dtype"]) == (1, dtype)
        assert (result["num_images"], result["num_classes"], result["images_in_sequence"]) == (20, 5, patch_size**2)
        first, second, again = result["runs"]
        assert first == again
        assert first["frechet_train"] != second["frechet_train"]
        assert result["mean"]["recognition"] < 0.6
        assert result["mean"]["copies"] == 0
        assert result["mean"]["frechet_train"] > 0
        assert ("sequence_hands" in first) == (patch_size > 1)
        with Image.open(tmp_path / "q.png") as sheet:
            assert sheet.size == (5 * SIDE + 4 * 2, SIDE)
        assert f"| recognised, % | {100 * result['real']['recognition']:.1f} |" in capsys.readouterr().out

    def test_a_model_of_another_size(self, data, trained, tmp_path, capsys) -> None:
        trained.save(tmp_path / "r.safetensors")
        tiny_pipeline(id2label=dict(enumerate(CLASSES))).save_pretrained(tmp_path / "model")
        with pytest.raises(SystemExit):
            quality.main(
                [f"--data={data}", f"--recogniser={tmp_path / 'r.safetensors'}", f"--model={tmp_path / 'model'}"]
            )
        assert "draws 8 pixels a side and the drawings have 32; render them with --size 8" in capsys.readouterr().err

    def test_some_classes(self) -> None:
        pipe = tiny_pipeline(id2label=dict(enumerate(CLASSES)))
        assert quality.chosen_labels(pipe, CLASSES, 3, 2).tolist() == [0, 0, 2, 2, 4, 4]
        assert quality.chosen_labels(pipe, CLASSES, None, 1).tolist() == [0, 1, 2, 3, 4]
        assert quality.chosen_labels(pipe, CLASSES, 99, 1).tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("names", [["bar", "cross", "disc", "flag", "star"], CLASSES[::-1]])
    def test_a_model_of_other_classes(self, names: list[str]) -> None:
        with pytest.raises(DataError, match="the model's classes are not those of the drawings"):
            quality.chosen_labels(tiny_pipeline(id2label=dict(enumerate(names))), CLASSES, None, 1)


class TestExperiments:
    def test_they_are_judged_by_emoji_too(self, data, trained, tmp_path) -> None:
        """Fusion of untrained classes: who is seen is chance, that the squares are named is not."""
        trained.save(tmp_path / "r.safetensors")
        model = saved_pipeline(tmp_path / "model", CLASSES)
        common = [f"--model={model}", f"--output={tmp_path / 'out'}", "--num-inference-steps=1"]
        judged = [f"--emoji={data}", f"--recogniser={tmp_path / 'r.safetensors'}"]
        fusion.main([*common, *judged, "--classes", "bar", "disc", "--count=3", "--weights=2", "--rows=1"])
        squares = json.loads((tmp_path / "out" / "fusion.json").read_text())["recognised"]["squares"]
        assert [square["fused"] for square in squares] == ["bar + disc", "disc + bar"]
        assert all(sum(square["seen"].values()) == 3 for square in squares)
        ar_steps.main([*common, *judged, "--num-images=5"])
        rows = json.loads((tmp_path / "out" / "ar_steps.json").read_text())["rows"]
        assert all(row["frechet"] > 0 and row["frechet_error"] > 0 for row in rows)

    @pytest.mark.parametrize("more", [[], ["--recogniser=missing"]])
    def test_without_a_recogniser(self, data, tmp_path, more: list[str]) -> None:
        model = saved_pipeline(tmp_path / "model", CLASSES)
        options = [f"--model={model}", f"--output={tmp_path / 'out'}", f"--emoji={data}", *more]
        with pytest.raises(SystemExit, match=r"error: .*(needs --recogniser|missing)"):
            ar_steps.main([*options, "--num-images=5", "--num-inference-steps=1"])
