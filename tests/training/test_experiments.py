"""The paper's experiments on tiny models: what each measures, and that each leaves its result and its picture."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
from pictures import size_of
from PIL import Image
from rounding import assert_close
from scipy.stats import rankdata
from tiny import seeded, tiny_encoder, tiny_pipeline

from training import evaluate
from training.digits.export import main as export_digits
from training.digits.quality import pooled_pixels
from training.evaluation.quality import frechet_distance, frechet_error
from training.experiments import (
    ar_steps,
    common,
    digits,
    diversity,
    fewer_tokens,
    fusion,
    sequence_length,
    tables,
    variations,
)
from training.experiments.common import picture
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.presets import PUBLISHED


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a 1-step, an MRAR and a scale-level model with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, patch_size, scales in (("one_step", 1, None), ("mrar", 2, None), ("scales", 1, [1, 3])):
        encoder = tiny_encoder(patch_size, scales=scales)
        tiny_pipeline(condition_encoder=encoder).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, tmp_path):
    """Runs an experiment's `main` on a model, judged by pixels; returns its JSON."""

    def run(module, name, model, *more, judged=True):
        base = ["--output", str(tmp_path), "--num-inference-steps", "2"]
        judge = [
            "--num-images",
            "10",
            "--batch-size",
            "5",
            "--extractor",
            "pixels",
            "--reference",
            str(models / "real"),
        ]
        if judged and not (models / "real").exists():
            (models / "real").mkdir()
            for index in range(4):
                pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(models / "real" / f"{index}.png")
        chosen = [] if model is None else ["--model", str(models / model)]
        module.main([*base, *chosen, *(judge if judged else []), *more])
        assert (tmp_path / f"{name}.png").exists()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


class TestDiversity:
    def test_orthogonal_tokens_are_the_most_diverse(self):
        assert diversity.token_similarity(3 * torch.eye(5)[None])[0].item() == 0

    def test_equal_tokens_are_the_least(self):
        tokens = torch.ones(1, 5, 3) * torch.arange(1.0, 6)[None, :, None]
        assert [value.item() for value in diversity.token_similarity(tokens)] == pytest.approx([1, 1], rel=1e-5)

    def test_by_hand(self):
        """Three tokens at 0, 60 and 180 degrees: cosines 1/2, -1, -1/2."""
        angles = torch.tensor([0.0, math.pi / 3, math.pi])
        tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        root_mean_square, mean = (value.item() for value in diversity.token_similarity(tokens))
        assert root_mean_square == pytest.approx(math.sqrt((0.25 + 1 + 0.25) / 3), rel=1e-5)
        assert mean == pytest.approx(-1 / 3, rel=1e-5)

    def test_a_single_token_has_no_similarity(self):
        with pytest.raises(ValueError, match="there is 1"):
            diversity.token_similarity(torch.ones(2, 1, 3))

    def test_the_tokens_are_those_before_the_second_position_embedding(self):
        pipe = tiny_pipeline(patch_size=2)
        references = torch.randn(2, 3, 4, 4, 4, generator=seeded())
        features = diversity.condition_features(pipe, np.array([1, 3]), references)
        expected = pipe.encode_condition([1, 3], references) - pipe.condition_encoder.condition_position_embedding
        assert_close(features, expected)

    def test_command(self, run, models):
        result = run(diversity, "diversity", None, "--models", f"a={models / 'one_step'}", f"b={models / 'mrar'}")
        assert [row["images_in_sequence"] for row in result["rows"]] == [1, 4]
        assert all(0 < row["rms_similarity"] <= 1 and row["fid"] > 0 for row in result["rows"])
        assert "rank_correlation" not in result  # of two models it is always 1 or -1

    def test_along_a_run(self, run, models, tmp_path):
        """The checkpoints of a run in their order, and whether the measure goes with the quality."""
        kept = {5: "one_step", 40: "mrar", 300: "scales", 1000: "mrar", 2000: "one_step"}
        for step, name in kept.items():
            shutil.copytree(models / name, tmp_path / f"run/checkpoints/step-{step:08}/pipeline")
        result = run(diversity, "diversity", None, "--run", str(tmp_path / "run"))
        assert [row["name"] for row in result["rows"]] == [str(step) for step in kept]
        assert [row["images_in_sequence"] for row in result["rows"]] == [1, 4, 2, 4, 1]
        ranks = [rankdata([row[key] for row in result["rows"]]) for key in ("rms_similarity", "fid")]
        assert result["rank_correlation"]["value"] == pytest.approx(np.corrcoef(*ranks)[0, 1])

    def test_models_measured_earlier_are_not_measured_again(self, run, models, monkeypatch):
        command = (diversity, "diversity", None, "--models", f"a={models / 'one_step'}")
        first = run(*command)
        measured = []
        measure = diversity.measure_model
        monkeypatch.setattr(diversity, "measure_model", lambda *given: measured.append(given) or measure(*given))
        again = run(*command, f"b={models / 'scales'}")
        assert again["rows"][0] == first["rows"][0]
        run(*command, "--seed", "1")
        assert [name for _, name in measured] == ["b", "a"]

    def test_what_a_row_was_measured_with_can_be_written(self, tmp_path, monkeypatch):
        """Folders of real images are paths. Emoji are another judge, and another result."""
        measured = []
        monkeypatch.setattr(diversity, "measure_model", lambda *given: measured.append(given) or {"name": "a"})
        sampling = {"num_inference_steps": 1, "guidance_scale": None, "scheduler": None}
        common = {"seed": 0, "num_images": 1, "extractor": "pixels", **sampling}
        for real in [{"digits": tmp_path}, {"digits": tmp_path}, {"emoji": tmp_path}, {}]:
            judges = {"digits": None, "emoji": None, "reference": None} | real
            options = argparse.Namespace(output=tmp_path / "out", **judges, **common)
            diversity.measure_models(options, {"a": "folder"})
        assert len(measured) == 3

    def test_what_is_no_model_is_said_at_once(self, run, tmp_path):
        with pytest.raises(SystemExit, match="'mrar': expected NAME=FOLDER"):
            run(diversity, "diversity", None, "--models", "mrar")
        with pytest.raises(SystemExit, match="no checkpoints there"):
            run(diversity, "diversity", None, "--run", str(tmp_path))


class TestCommands:
    def test_steps_and_scheduler_are_the_model_s_unless_named(self, models, tmp_path):
        pipe = TransDiffPipeline.from_pretrained(models / "one_step")
        pipe.register_to_config(num_inference_steps=3)
        pipe.save_pretrained(tmp_path / "model")
        command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path)]
        for named, expected in (
            ([], ("FlowMatchEulerMaruyamaScheduler", 3)),
            (["--scheduler=unipc", "--num-inference-steps=2"], ("UniPCMultistepScheduler", 2)),
        ):
            options = common.parser(None).parse_args([*command, *named])
            facts = common.facts(options, common.load(options))
            assert (facts["scheduler"], facts["num_inference_steps"]) == expected

    def test_ar_steps(self, run, models, tmp_path):
        result = run(ar_steps, "ar_steps", "mrar")
        assert [row["ar_steps"] for row in result["rows"]] == [1, 2, 3, 4]
        seconds = [row["seconds_per_image"] for row in result["rows"]]
        assert seconds == sorted(seconds)
        assert len({row["fid"] for row in result["rows"]}) == 4

    def test_sequence_length(self, run, models):
        names = ["one_step", "scales", "mrar"]
        result = run(
            sequence_length, "sequence_length", None, "--models", *(f"{name}={models / name}" for name in names)
        )
        assert [(row["name"], row["images_in_sequence"]) for row in result["rows"]] == [
            ("one_step", 1),
            ("scales", 2),
            ("mrar", 4),
        ]
        assert len({row["fid"] for row in result["rows"]}) == 3
        with pytest.raises(SystemExit):
            run(sequence_length, "sequence_length", None, "--models", f"a={models / 'mrar'}", judged=False)

    def test_the_scale_level_condition_has_its_own_number_of_tokens(self, run):
        result = run(fewer_tokens, "fewer_tokens", "scales")
        assert [row["tokens"] for row in result["rows"]] == [1, 2, 4, 8]

    def test_fewer_tokens(self, run, models, tmp_path):
        """All tokens of the finished condition make what the sequence makes."""
        result = run(fewer_tokens, "fewer_tokens", "one_step")
        assert [row["tokens"] for row in result["rows"]] == [1, 2, 4, 8, 16]
        whole = run(ar_steps, "ar_steps", "one_step")["rows"][-1]
        assert result["rows"][-1]["fid"] == pytest.approx(whole["fid"], rel=1e-3)

    @pytest.mark.parametrize("model", ["one_step", "mrar"])
    def test_fusion(self, run, tmp_path, model):
        result = run(fusion, "fusion", model, "--classes", "0", "zebra", "--weights", "3", "--rows", "2", judged=False)
        assert result["interpolation"] == [0, 0.5, 1]
        strip = np.asarray(Image.open(tmp_path / "fusion_strip.png"))
        assert strip.shape[:2] == (2 * 8 + 2, 3 * 8 + 4)

    def test_fused_digits_are_told_apart(self):
        """Of the squares off the diagonal; 0 is neither a row's nor a column's class."""
        labels = np.array([[3, 3], [3, 6], [0, 3], [6, 6]])
        shares = fusion.recognised_shares([(3, 3), (3, 6), (6, 3), (6, 6)], labels)
        assert shares == {"row": 0.25, "column": 0.5, "other": 0.25}

    def test_both_fused_classes_may_be_the_two_highest(self):
        seen = np.array([[[3, 3]] * 2, [[3, 6], [6, 3]], [[6, 0], [3, 6]]])
        rows = fusion.in_words([(3, 3), (3, 6), (6, 3)], seen, {3: "dog face", 6: "hot dog"})
        assert rows == [
            {"fused": "dog face + hot dog", "both_are_highest": 1, "seen": {"dog face": 1, "hot dog": 1}},
            {"fused": "hot dog + dog face", "both_are_highest": 0.5, "seen": {"hot dog": 1, "dog face": 1}},
        ]

    def test_variations_of_pictures(self, run, tmp_path):
        files = [tmp_path / "a.png", tmp_path / "b.png"]
        for index, file in enumerate(files):
            Image.new("RGB", (20, 30), (80 * index, 40, 200)).save(file)
        run(variations, "variations", "mrar", "--pictures", *map(str, files), "--class-label", "zebra", judged=False)

    def test_variations_need_pictures_or_digits(self, run):
        with pytest.raises(SystemExit):
            run(variations, "variations", "mrar", "--pictures", "a.png", judged=False)

    def test_the_distance_to_references_is_to_the_nearest_of_ones_own(self):
        images = np.random.default_rng(0).random((3, 32, 32, 3))
        own = pooled_pixels(images)[:, None]
        assert variations.nearest(images, own) == 0
        assert variations.nearest(images, np.roll(own, 1, axis=0)) > 0
        assert variations.nearest(images, np.concatenate([own + 1, own], axis=1)) == 0

    def test_on_digits(self, tmp_path):
        """What only digits are judged by, on the bundled model: variations of real ones, and fused ones recognised."""
        export_digits(["--output", str(tmp_path / "data")])
        options = ["--digits", str(tmp_path / "data"), "--num-inference-steps", "1", "--output", str(tmp_path)]
        variations.main([*options, "--num-images", "20"])
        rows = json.loads((tmp_path / "variations.json").read_text())["rows"]
        assert [row["references"] for row in rows] == [0, 1, 2, 3]
        assert all(0 < row["own_reference"] < 60 and 0 < row["reference_of_another"] < 60 for row in rows[1:])
        assert size_of(tmp_path / "variations.png") == (9 * 34 - 2, 10 * 34 - 2)
        fusion.main([*options, "--classes", "0", "1", "--rows", "1", "--weights", "2", "--count", "3"])
        shares = json.loads((tmp_path / "fusion.json").read_text())["recognised"]["fused"]
        assert sum(shares.values()) == pytest.approx(1)

    def test_references_are_of_the_wanted_class(self):
        images, labels = np.arange(6.0).reshape(6, 1, 1, 1), np.array([0, 1, 0, 1, 0, 1])
        picked = variations.pick_references(images, labels, np.array([1, 0, 1]), 2)
        assert picked[..., 0, 0, 0].tolist() == [[1, 3], [0, 2], [5, 1]]

    def test_tables(self, capsys):
        """Every published model is there, and every command is one that the evaluation understands."""
        tables.main([])
        printed = capsys.readouterr().out
        commands = [line for line in printed.splitlines() if line.startswith("accelerate launch")]
        assert len(commands) == 2 * len(PUBLISHED) - 1
        for line in commands:
            options = evaluate.parse(line.split()[4:])
            assert options.preset in PUBLISHED
        assert "| transdiff_h_mrar | 1.28 | 1.42 | 301.2 | 0.81 | 0.62 |" in printed

    def test_pictures_stand_in_rows(self):
        shown = np.asarray(picture([np.zeros((3, 4, 4, 3)), np.zeros((1, 4, 4, 3))], gap=1))
        assert shown.shape == (9, 14, 3)
        assert shown[:4, :4].max() == 0
        assert shown[5:, 5:].min() == 255


def test_the_standard_error_is_the_spread_over_samples():
    """Resampling one sample tells how much the distance varies from sample to sample."""
    random = np.random.default_rng(0)
    reference = random.normal(size=(500, 3))
    samples = random.normal(0.5, size=(60, 400, 3))
    spread = np.std([frechet_distance(sample, reference) for sample in samples], ddof=1)
    assert frechet_error(samples[0], reference) == pytest.approx(spread, rel=0.4)


def test_longer_sequences_share_one_encoder():
    """p = 4: sixteen images to a sequence, through the same components (paper, Figure 7)."""
    pipe = tiny_pipeline(4, condition_encoder=tiny_encoder(4))
    output = pipe(0, num_inference_steps=1, output_type="latent", return_intermediates=True)
    assert len(output.intermediates) == 16


class TestAllOnDigits:
    @pytest.fixture
    def options(self, tmp_path):
        return ["--one-step", "a", "--mrar", "b", "--data", "c", "--output", str(tmp_path)]

    def test_finished_experiments_are_not_run_again(self, options, tmp_path, monkeypatch):
        runs = []

        def finish(arguments):
            folder = tmp_path / "ar_steps"
            runs.append(arguments)
            folder.mkdir()
            (folder / "ar_steps.json").write_text(json.dumps({"rows": [{"ar_steps": 1, "frechet": 0.123456}]}))
            Image.new("RGB", (2, 2)).save(folder / "ar_steps.png")

        entry = digits.EXPERIMENTS["ar_steps"]
        monkeypatch.setitem(digits.EXPERIMENTS, "ar_steps", (entry[0], finish, *entry[2:]))
        for _ in range(2):
            digits.main([*options, "--only", "ar_steps"])
        assert len(runs) == 1
        assert runs[0][runs[0].index("--model") + 1] == "b"
        written = (tmp_path / "results.md").read_text()
        assert "| ar steps | frechet |\n| --- | --- |\n| 1 | 0.1235 |" in written
        assert "![Quality against AR steps](ar_steps/ar_steps.png)" in written

    @pytest.mark.parametrize("name", digits.COMPARED)
    def test_further_models_join_the_comparisons(self, options, monkeypatch, name):
        lines = []
        entry = digits.EXPERIMENTS[name]
        monkeypatch.setitem(digits.EXPERIMENTS, name, (entry[0], lines.append, *entry[2:]))
        digits.main([*options, "--only", name, "--models", "p4=d", "scales=e"])
        first = lines[0].index("--models")
        assert lines[0][first + 1 : first + 5] == ["1-step=a", "MRAR=b", "p4=d", "scales=e"]

    def test_the_search_is_one_that_the_evaluation_understands(self, options, monkeypatch):
        entry = digits.EXPERIMENTS["sampler"]
        lines = []
        monkeypatch.setitem(digits.EXPERIMENTS, "sampler", (entry[0], lines.append, *entry[2:]))
        digits.main([*options, "--only", "sampler"])
        parsed = evaluate.parse(lines[0])
        assert dict(parsed.search) == {
            "drift_scale": [0.9, 1.0, 1.1],
            "diffusion_scale": [1.0, 1.15, 1.3, 1.45],
        }
