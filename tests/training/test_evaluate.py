"""Evaluation: the same images from any number of processes, what is measured of them, and the command."""

import json

import numpy as np
import pytest
import torch
from evaluating import small_extractor, write_pictures
from launching import launch
from pictures import size_of
from PIL import Image
from tiny import tiny_pipeline

from training import evaluate as command
from training.data.errors import DataError
from training.evaluation.features import (
    EXTRACTORS,
    load_extractor,
    register_extractor,
)
from training.evaluation.measure import measure
from training.evaluation.metrics import (
    Statistics,
)
from training.evaluation.references import Reference, load_reference
from training.evaluation.sampling import (
    SamplingError,
    check_settings,
    image_path,
    make_labels,
    read_images,
    sample,
    write_npz,
)
from training.evaluation.search import parse_axis
from transdiff_pipelines import TransDiffPipeline, half_precision


CPU = torch.device("cpu")
NUM_CLASSES = 5
CALL = {"num_inference_steps": 2}


@pytest.fixture(autouse=True)
def registered():
    register_extractor("small")(small_extractor)
    yield
    del EXTRACTORS["small"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(patch_size=2)


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


class TestSampling:
    def test_labels(self):
        balanced = make_labels(20, NUM_CLASSES, "balanced", 0)
        assert np.bincount(balanced).tolist() == [4] * NUM_CLASSES
        drawn = make_labels(200, NUM_CLASSES, "random", 3)
        assert set(drawn.tolist()) == set(range(NUM_CLASSES))
        assert np.array_equal(drawn, make_labels(200, NUM_CLASSES, "random", 3))
        assert not np.array_equal(drawn, make_labels(200, NUM_CLASSES, "random", 4))
        with pytest.raises(SamplingError, match="choose a multiple of 5, or random labels"):
            make_labels(12, NUM_CLASSES, "balanced", 0)

    def test_any_number_of_processes_writes_the_same_files(self, pipe, tmp_path):
        labels = make_labels(10, NUM_CLASSES, "balanced", 0)
        assert sample(pipe, labels, tmp_path / "one", 7, 3, CALL) == 10
        assert [sample(pipe, labels, tmp_path / "two", 7, 3, CALL, rank, 2) for rank in (0, 1)] == [6, 4]
        assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
        assert len(files_of(tmp_path / "one")) == 10

    def test_another_batch_size_changes_rounding_only(self, pipe, tmp_path):
        labels = make_labels(10, NUM_CLASSES, "balanced", 0)
        for name, batch_size in (("three", 3), ("ten", 10)):
            sample(pipe, labels, tmp_path / name, 7, batch_size, CALL)
        three, ten = (
            torch.cat(list(read_images([image_path(tmp_path / name, i) for i in range(10)]))).int()
            for name in ("three", "ten")
        )
        assert (three - ten).abs().max() <= 1

    def test_an_interrupted_run_goes_on(self, pipe, tmp_path):
        labels = make_labels(10, NUM_CLASSES, "balanced", 0)
        sample(pipe, labels, tmp_path, 7, 3, CALL)
        before = files_of(tmp_path)
        for index in (4, 9):
            image_path(tmp_path, index).unlink()
        assert sample(pipe, labels, tmp_path, 7, 3, CALL) == 4  # the batches 3..5 and 9
        assert files_of(tmp_path) == before
        assert sample(pipe, labels, tmp_path, 7, 3, CALL) == 0

    def test_images_of_other_settings_are_not_mixed(self, tmp_path):
        check_settings(tmp_path, {"seed": 0, "sampling": {"guidance_scale": 1.0}})
        check_settings(tmp_path, {"seed": 0, "sampling": {"guidance_scale": 1.0}})
        with pytest.raises(SamplingError, match="seed was 0, is 1"):
            check_settings(tmp_path, {"seed": 1, "sampling": {"guidance_scale": 1.0}})

    def test_npz(self, tmp_path):
        paths = write_pictures(tmp_path / "pictures", 7)
        write_npz(paths, tmp_path / "samples.npz")
        with np.load(tmp_path / "samples.npz") as arrays:
            assert arrays.files == ["arr_0"]
            np.testing.assert_array_equal(arrays["arr_0"], [np.asarray(Image.open(path)) for path in paths])


class TestMeasure:
    def test_what_cannot_be_computed_is_named(self, tmp_path):
        paths = write_pictures(tmp_path / "generated", 12)
        statistics = Reference(Statistics(np.zeros(64), np.eye(64)))
        result = measure(paths, load_extractor("pixels", None, CPU), statistics)
        assert set(result["metrics"]) == {"fid"}
        assert set(result["not_computed"]) == {"sfid", "inception_score", "precision", "recall"}
        assert "statistics alone" in result["not_computed"]["precision"]
        assert "12 generated images is not of full rank in 64 features" in result["notes"][0]

    def test_everything_of_a_full_reference(self, tmp_path):
        paths = write_pictures(tmp_path / "generated", 12)
        reference = load_reference(str(tmp_path / "generated"), small_extractor(None, CPU), "small", 8, tmp_path)
        result = measure(paths, small_extractor(None, CPU), reference)
        assert result["not_computed"] == {}
        assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
        assert result["metrics"]["sfid"] == pytest.approx(0, abs=1e-6)
        assert result["metrics"]["precision"] == result["metrics"]["recall"] == 1
        assert result["metrics"]["inception_score"] >= 1


def arguments(model, output, tmp_path, *more):
    common = ["--model", str(model), "--output", str(output), "--num-images", "10", "--batch-size", "5"]
    cached = ["--num-inference-steps", "2", "--reference-cache", str(tmp_path / "cache")]
    return [*common, *cached, *more]


class TestCommand:
    def test_results(self, model, tmp_path, capsys):
        write_pictures(tmp_path / "real", 12)
        run = arguments(model, tmp_path / "out", tmp_path, "--extractor", "small", "--npz", "--guidance-scale", "1.5")
        command.main([*run, "--reference", str(tmp_path / "real")])
        printed = capsys.readouterr().out
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert f"fid: {result['metrics']['fid']:.4f}" in printed
        assert result["sampling"] == {
            "guidance_scale": 1.5,
            "drift_scale": 0.9,
            "diffusion_scale": 0.95,
            "num_inference_steps": 2,
            "num_ar_steps": None,
            "scheduler": "FlowMatchEulerMaruyamaScheduler",
        }
        row = (tmp_path / "out" / "results.md").read_text().splitlines()[-1]
        assert f"{result['metrics']['fid']:.4g}" in row
        assert "type: fid" in (tmp_path / "out" / "model-index.yml").read_text()
        assert size_of(tmp_path / "out" / "samples.png") == (64, 8)
        assert (tmp_path / "out" / "samples_10.npz").exists()

    def test_steps_are_the_checkpoint_s_and_the_scheduler_can_be_another(self, pipe, tmp_path):
        pipe = TransDiffPipeline(**pipe.components, num_inference_steps=3)
        pipe.save_pretrained(tmp_path / "model")
        for name, named, scheduler in (
            ("own", [], "FlowMatchEulerMaruyamaScheduler"),
            ("other", ["--scheduler=unipc"], "UniPCMultistepScheduler"),
        ):
            run = [f"--model={tmp_path / 'model'}", f"--output={tmp_path / name}", "--num-images=5", *named]
            command.main([*run, "--extractor=small"])
            sampling = json.loads((tmp_path / name / "results.json").read_text())["sampling"]
            assert (sampling["num_inference_steps"], sampling["scheduler"]) == (3, scheduler)
        images = [files_of(tmp_path / name) for name in ("own", "other")]
        assert images[0] != images[1]

    def test_without_an_extractor_the_images_remain(self, model, tmp_path, capsys):
        command.main(arguments(model, tmp_path / "out", tmp_path))
        assert "no feature extractor was chosen" in capsys.readouterr().out
        assert len(files_of(tmp_path / "out")) == 10

    @pytest.mark.parametrize(("ratio", "times"), [(30.0, 1), (1.0, 0)])
    def test_slow_half_precision_is_told_of_once(self, model, tmp_path, capsys, monkeypatch, ratio, times):
        monkeypatch.setattr(half_precision, "slowdown", lambda dtype: ratio)
        command.main(arguments(model, tmp_path / "out", tmp_path, "--dtype", "bfloat16"))
        assert capsys.readouterr().err.count("note: bfloat16 is slow on this processor") == times

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--preset", "transdiff_b"], "add --settings published"),
            (["--extractor-weights", "file"], "add --extractor"),
            (["--search", "guidance_scale=1,2", "--search", "guidance_scale=3"], "given twice"),
            (["--search", "guidance_scale=1,2", "--guidance-scale", "3"], "leave --guidance-scale out"),
        ],
    )
    def test_options_without_effect_are_refused(self, tmp_path, capsys, more, message):
        with pytest.raises(SystemExit):
            command.main(arguments("missing", tmp_path / "out", tmp_path, *more))
        assert message in capsys.readouterr().err

    def test_bad_settings_are_said_before_the_reference_is_measured(self, model, tmp_path, capsys):
        write_pictures(tmp_path / "real", 12)
        more = ["--extractor", "small", "--reference", str(tmp_path / "real"), "--guidance-scale", "1,2"]
        with pytest.raises(SystemExit, match="2 values"):
            command.main(arguments(model, tmp_path / "out", tmp_path, *more))
        assert "reference features" not in capsys.readouterr().err
        assert not (tmp_path / "cache").exists()

    def test_a_folder_of_the_reference_that_cannot_be_read_is_an_error(self, model, tmp_path, monkeypatch):
        def refuse(folder):
            raise DataError(f"folder {folder} cannot be read: Permission denied")

        (tmp_path / "real").mkdir()
        monkeypatch.setattr("training.data.folders.visible", refuse)
        more = ["--extractor", "small", "--reference", str(tmp_path / "real")]
        with pytest.raises(SystemExit, match="error: folder .*real cannot be read: Permission denied"):
            command.main(arguments(model, tmp_path / "out", tmp_path, *more))

    def test_the_archive_of_a_finished_evaluation_is_written_when_it_is_asked_for(self, model, tmp_path):
        command.main(arguments(model, tmp_path / "out", tmp_path))
        command.main(arguments(model, tmp_path / "out", tmp_path, "--npz"))
        assert (tmp_path / "out" / "samples_10.npz").exists()

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--reference", "{real}"], "no extractor of features .* add --extractor"),
            (["--extractor", "vgg"], "'vgg' is unknown"),
            (["--extractor", "broken"], "'broken' fails on pictures of 8 pixels"),
            (["--extractor", "small", "--reference", "missing"], "there is no reference missing"),
            (["--extractor", "pixels", "--reference", "{statistics}"], "6.*'pixels' makes 64"),
            (["--model", "./missing"], "model ./missing does not exist"),
            (["--model", "{real}"], "without model_index.json"),
            (["--num-ar-steps", "9"], "9"),
            (["--guidance-scale", "1,2"], "2 values"),
            (["--guidance-scale", "nan"], "nan"),
            (["--output", "{file}"], "is a file; name a folder"),
            (["--output", "{file}/inside"], "cannot be written"),
            (["--drift-scale", "inf"], "drift_scale is inf"),
            (["--num-images", "13"], "multiple of"),
            (["--search", "drift_scale=0.9,-1", "--extractor", "small"], "drift_scale is -1.0"),
            (["--search", "guidance_scale=1,nan"], "nan"),
            (["--search", "guidance_scale=1,2"], "--metric fid, but no extractor"),
            (
                ["--search", "guidance_scale=1,2", "--extractor", "small"],
                "fid, which cannot be .* no reference was given",
            ),
            (
                ["--search", "guidance_scale=1,2", "--extractor", "pixels", "--metric", "inception_score"],
                "probabilities",
            ),
            (["--extractor", "small", "--reference", "{real}", "--reference-cache", "{file}"], "is a file"),
        ],
    )
    def test_what_cannot_work_is_said_before_the_first_image(self, model, tmp_path, monkeypatch, more, message):
        paths = {"real": tmp_path / "real", "statistics": tmp_path / "statistics.npz", "file": tmp_path / "file"}
        write_pictures(paths["real"], 4)
        np.savez(paths["statistics"], mu=np.zeros(6), sigma=np.eye(6))
        paths["file"].touch()
        monkeypatch.setitem(EXTRACTORS, "broken", lambda weights, device: lambda images: images.nothing)
        more = [part.format(**paths) for part in more]
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            command.main(arguments(model, tmp_path / "out", tmp_path, *more))
        assert not (tmp_path / "out" / "images").exists()

    @pytest.mark.parametrize(
        "more", [["--num-images", "0"], ["--batch-size", "0"], ["--metric", "fidd"], ["--guidance-scale", "1;2"]]
    )
    def test_wrong_usage(self, model, tmp_path, more):
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments(model, tmp_path / "out", tmp_path, *more))

    def test_guidance_of_each_image_of_the_sequence(self, model, tmp_path):
        more = ["--guidance-scale", "1,1.2,1.4,2", "--num-images", "5"]
        command.main(arguments(model, tmp_path / "out", tmp_path, *more))
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert result["sampling"]["guidance_scale"] == [1, 1.2, 1.4, 2]

    def test_published_settings_need_a_published_model(self, model, tmp_path):
        with pytest.raises(SystemExit, match="has not the sizes of a published model"):
            command.main(arguments(model, tmp_path / "out", tmp_path, "--settings", "published"))

    def test_published_settings_by_name(self, model, tmp_path):
        options = command.parse(arguments(model, tmp_path, tmp_path, "--settings", "published"))
        pipe = tiny_pipeline(patch_size=2)
        options.preset = "transdiff_l_mrar"
        with pytest.raises(SamplingError, match="latent size is 4"):
            command.sampling_settings(pipe, options)
        pipe.transformer.register_to_config(sample_size=16)
        settings = command.sampling_settings(pipe, options)
        assert settings["drift_scale"] == 0.925
        assert settings["guidance_scale"] == 1.30
        pipe.transformer.register_to_config(sample_size=4)

    def test_a_search_goes_on_where_it_stopped(self, model, tmp_path, monkeypatch):
        write_pictures(tmp_path / "real", 12)
        axes = ["--search", "guidance_scale=1,1.5", "--search", "drift-scale=0.8,0.9"]
        run = arguments(model, tmp_path / "out", tmp_path, "--extractor", "small", *axes)
        run += ["--reference", str(tmp_path / "real")]
        command.main(run)
        found = json.loads((tmp_path / "out" / "search.json").read_text())
        assert found["axes"] == {"guidance_scale": [1, 1.5], "drift_scale": [0.8, 0.9]}
        assert len({row["metrics"]["fid"] for row in found["results"]}) == 4
        assert (tmp_path / "out" / "search.png").exists()
        monkeypatch.setattr(command, "measure", lambda *a: pytest.fail("measured again"))
        command.main(run)
        assert json.loads((tmp_path / "out" / "search.json").read_text()) == found

    @pytest.mark.parametrize("text", ["seed=1,2", "guidance_scale=a", "guidance_scale"])
    def test_bad_axes(self, text):
        with pytest.raises(Exception, match="cannot be searched|expected numbers"):
            parse_axis(text)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_two_processes(self, model, tmp_path):
        told = []
        for count in (1, 2):
            command = ["training.evaluate", *arguments(model, tmp_path / str(count), tmp_path)]
            told.append(len(launch(*command, processes=count).splitlines()))
        assert told[0] == told[1]  # two processes that know of each other: one of them speaks
        assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
