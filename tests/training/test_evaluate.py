"""Evaluation: the same images from any number of processes, metrics that agree with a second implementation."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch
from pictures import size_of
from PIL import Image
from rounding import assert_close
from scipy.linalg import sqrtm
from tiny import tiny_pipeline

from training import evaluate as command
from training.data.errors import DataError
from training.evaluation import references as reference_module
from training.evaluation.features import (
    EXTRACTORS,
    ExtractorError,
    Features,
    load_extractor,
    register_extractor,
    try_extractor,
)
from training.evaluation.measure import measure
from training.evaluation.metrics import (
    InceptionScore,
    RunningStatistics,
    Statistics,
    frechet_distance,
    precision_recall,
)
from training.evaluation.references import Reference, ReferenceImagesError, check_fits, load_reference
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


def small_extractor(weights, device):
    """Every kind of features, from fixed random projections of the pixels."""

    def extract(images):
        flat = images.flatten(1).float() / 255
        generator = torch.Generator().manual_seed(0)
        pool, logits, spatial = (torch.randn(flat.shape[1], n, generator=generator) for n in (6, 4, 3))
        return Features(pool=flat @ pool, logits=flat @ logits, spatial=flat @ spatial)

    return extract


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


def write_pictures(folder, count, side=8, seed=0):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    paths = [folder / f"{index:03d}.png" for index in range(count)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def cut_off(path):
    """Half of an archive with images."""
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:500])


def normal(count, width, seed, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def statistics_of(features, batch_size=7):
    running = RunningStatistics()
    for batch in features.split(batch_size):
        running.add(batch)
    return running.result()


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


class TestMetrics:
    def test_running_statistics(self):
        """Also of features far from zero, where sums of squares lose the covariance."""
        features = normal(100, 5, 0).double() + 1e6
        statistics = statistics_of(features)
        np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-8)
        assert statistics.count == 100

    def test_frechet_distance_agrees_with_the_root_of_the_product(self):
        first, second = statistics_of(normal(200, 6, 0)), statistics_of(normal(150, 6, 1, shift=0.3) * 1.7)
        root = sqrtm(first.covariance @ second.covariance)
        traces = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root).real
        expected = np.square(first.mean - second.mean).sum() + traces
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)

    def test_frechet_distance_of_one_dimension(self):
        """(m - m')² + (s - s')²."""
        first, second = Statistics(np.array([1.0]), np.array([[4.0]])), Statistics(np.array([3.0]), np.array([[9.0]]))
        assert frechet_distance(first, second) == pytest.approx(5.0)

    def test_other_features_cannot_be_compared(self):
        with pytest.raises(ValueError, match="statistics of 3 and of 4 features"):
            frechet_distance(statistics_of(normal(9, 3, 0)), statistics_of(normal(9, 4, 0)))

    def test_inception_score_by_the_definition(self):
        logits = normal(103, 7, 0).double() * 3
        score = InceptionScore(103)
        for batch in logits.split(20):
            score.add(batch)
        p = logits.softmax(1)[np.random.RandomState(2020).permutation(103)]
        scores = []
        for i in range(10):
            part = p[i * 103 // 10 : (i + 1) * 103 // 10]
            scores.append((part * (part.log() - part.mean(0).log())).sum(1).mean().exp().item())
        assert score.result() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)

    def test_inception_score_of_images_sorted_by_class(self):
        """Ten certain classes, as many of each, score near 10 in whatever order they come."""
        logits = 50 * torch.eye(10).repeat_interleave(200, dim=0)
        score = InceptionScore(2000)
        score.add(logits)
        assert score.result()[0] == pytest.approx(10, rel=0.05)

    def test_inception_score_wants_all_images(self):
        score = InceptionScore(20)
        score.add(torch.zeros(19, 3))
        with pytest.raises(ValueError, match="set up for 20 images, but got 19"):
            score.result()

    def test_precision_and_recall_by_the_definition(self):
        generated, real = normal(60, 3, 0), normal(50, 3, 1, shift=0.8)

        def share(points, centres):
            """Of the points in the ball of a centre that reaches to its third neighbour."""
            between = np.linalg.norm(centres[:, None].numpy() - centres[None].numpy(), axis=-1)
            radii = np.sort(between, axis=1)[:, 3]
            return (np.linalg.norm(points[:, None].numpy() - centres[None].numpy(), axis=-1) <= radii).any(1).mean()

        expected = share(generated, real), share(real, generated)
        assert precision_recall(generated, real, batch_size=11) == pytest.approx(expected)
        assert expected[0] != expected[1]

    def test_precision_and_recall_of_a_collapsed_model(self):
        real = normal(200, 3, 0)
        collapsed = real[:1] + 1e-3 * normal(200, 3, 1)
        precision, recall = precision_recall(collapsed, real)
        assert precision == 1
        assert recall < 0.05

    def test_agreement_with_torch_fidelity(self):
        """Numbers of torch-fidelity 0.4.0 on the same features (fid_statistics_to_metric, isc_features_to_metric,
        calculate_precision_recall_part)."""
        recorded = json.loads((Path(__file__).parents[1] / "fixtures" / "torch_fidelity_metrics.json").read_text())
        generated, real = normal(300, 16, 0), 1.2 * normal(250, 16, 1, shift=0.2)
        assert frechet_distance(statistics_of(generated), statistics_of(real)) == pytest.approx(
            recorded["fid"], rel=1e-5
        )
        score = InceptionScore(300)
        score.add(generated * 2)
        assert score.result() == pytest.approx((recorded["isc_mean"], recorded["isc_std"]), rel=1e-6)
        assert precision_recall(generated, real) == pytest.approx((recorded["precision"], recorded["recall"]))


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


class TestReferences:
    def test_a_folder_is_measured_once(self, tmp_path, monkeypatch):
        write_pictures(tmp_path / "real", 12)
        load = [str(tmp_path / "real"), small_extractor(None, CPU), "small", 8, tmp_path / "cache"]
        first = load_reference(*load)
        assert first.statistics.count == 12
        assert first.features.shape == (12, 6)
        assert first.spatial is not None
        monkeypatch.setattr(reference_module, "measure_images", lambda *a: pytest.fail("measured again"))
        second = load_reference(*load)
        np.testing.assert_array_equal(first.statistics.covariance, second.statistics.covariance)

    def test_changed_images_are_measured_again(self, tmp_path):
        write_pictures(tmp_path / "real", 12)
        load = [str(tmp_path / "real"), small_extractor(None, CPU), "small", 8, tmp_path / "cache"]
        first = load_reference(*load)
        write_pictures(tmp_path / "real" / "more", 3, seed=1)
        assert load_reference(*load).statistics.count == 15 != first.statistics.count

    def test_an_archive_of_images_is_like_their_folder(self, tmp_path):
        paths = write_pictures(tmp_path / "real", 9)
        write_npz(paths, tmp_path / "real.npz")
        folder, archive = (
            load_reference(str(source), small_extractor(None, CPU), "small", 8, tmp_path)
            for source in (tmp_path / "real", tmp_path / "real.npz")
        )
        np.testing.assert_allclose(folder.statistics.covariance, archive.statistics.covariance)
        assert torch.equal(folder.features, archive.features)

    def test_an_adm_reference_batch(self, tmp_path):
        """Statistics as they are in the file, features of its images."""
        pictures = torch.cat(list(read_images(write_pictures(tmp_path / "real", 9))))
        arrays = {"arr_0": pictures.permute(0, 2, 3, 1).numpy(), "mu": np.zeros(6), "sigma": np.eye(6)}
        np.savez(tmp_path / "adm.npz", **arrays, mu_s=np.ones(3), sigma_s=np.eye(3))
        reference = load_reference(str(tmp_path / "adm.npz"), small_extractor(None, CPU), "small", 8, tmp_path)
        assert reference.statistics.mean.tolist() == [0] * 6
        assert reference.spatial.mean.tolist() == [1] * 3
        assert_close(reference.features, small_extractor(None, CPU)(pictures).pool)  # there in batches

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, "there is no reference"),
            (lambda path: path.mkdir(), "holds no images"),
            (lambda path: np.savez(path, other=np.zeros(1)), r"holds \['other'\]; expected mu and sigma"),
            (lambda path: np.savez(path, arr_0=np.zeros((2, 3))), "expected uint8"),
            (lambda path: path.write_text("no archive"), r"reference\.npz is no whole \.npz file"),
            (lambda path: path.touch(), r"reference\.npz is no whole \.npz file"),
            (one_array, "one array without a name"),
            (lambda path: np.savez(path, mu=np.array([{}])), r"holds \['mu'\]"),
            (lambda path: np.savez(path, mu=np.array([{}]), sigma=np.eye(6)), "Object arrays"),
            (cut_off, r"reference\.npz is no whole \.npz file"),
        ],
    )
    def test_errors(self, tmp_path, make, message):
        path = tmp_path / "reference.npz"
        make(path)
        with pytest.raises(ReferenceImagesError, match=message):
            load_reference(str(path), small_extractor(None, CPU), "small", 8, tmp_path)

    def test_one_broken_picture_is_named(self, tmp_path):
        write_pictures(tmp_path / "real", 3)
        (tmp_path / "real" / "001.png").write_bytes((tmp_path / "real" / "001.png").read_bytes()[:60])
        with pytest.raises(ReferenceImagesError, match=r"001\.png cannot be used .*; mend it, or take it out"):
            load_reference(str(tmp_path / "real"), small_extractor(None, CPU), "small", 8, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "real.txt").touch()
        with pytest.raises(ReferenceImagesError, match=r"real\.txt is a file of another kind; give an \.npz"):
            load_reference(str(tmp_path / "real.txt"), small_extractor(None, CPU), "small", 8, tmp_path)

    def test_a_dataset_that_cannot_be_read(self, tmp_path):
        with pytest.raises(ReferenceImagesError, match="the dataset no/such cannot be read"):
            load_reference("hf:no/such", small_extractor(None, CPU), "small", 8, tmp_path)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mean of shape \(5,\) .* 'small' makes 6"),
            ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"covariance of shape \(5, 5\)"),
            ({"mu": np.zeros((1, 6)), "sigma": np.eye(6)}, r"mean of shape \(1, 6\)"),
            ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "not finite"),
            ({"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}, "4.* of spatial"),
        ],
    )
    def test_statistics_of_other_features(self, tmp_path, arrays, message):
        np.savez(tmp_path / "statistics.npz", **arrays)
        extractor = small_extractor(None, CPU)
        reference = load_reference(str(tmp_path / "statistics.npz"), extractor, "small", 8, tmp_path)
        with pytest.raises(ReferenceImagesError, match=message):
            check_fits(reference, "statistics.npz", try_extractor("small", extractor, 8), "small")


class TestExtractors:
    def test_torchscript(self, tmp_path):
        """A network with the calls of inception-2015-12-05.pt."""

        class Inception(torch.nn.Module):
            def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
                pool = x.float().mean(dim=[2, 3])
                if return_features:
                    return pool
                return (pool + (0.0 if no_output_bias else 1e3)).softmax(dim=1)

        torch.jit.script(Inception()).save(tmp_path / "inception.pt")
        images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        features = load_extractor("torchscript", tmp_path / "inception.pt", CPU)(images)
        torch.testing.assert_close(features.pool, images.float().mean(dim=[2, 3]))
        torch.testing.assert_close(features.logits.softmax(1).float(), features.pool.softmax(1))
        assert features.spatial is None

    def test_torch_fidelity(self, tmp_path, monkeypatch):
        """A network with the calls of FeatureExtractorInceptionV3: what is taken from it, in ADM's order."""

        class Mixed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.branch1x1 = torch.nn.Identity()

        class Inception(torch.nn.Module):
            def __init__(self, name, features_list, feature_extractor_weights_path, **kwargs):
                super().__init__()
                assert features_list == ["2048", "logits_unbiased"]
                self.Mixed_6d = Mixed()
                self.scale = torch.load(feature_extractor_weights_path, weights_only=True)["scale"]

            def forward(self, x):
                grid = self.Mixed_6d.branch1x1(torch.arange(2 * 9 * 4.0).reshape(2, 9, 2, 2))
                return self.scale * grid.mean(dim=[2, 3]), grid.amax(dim=[2, 3])

        module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
        module.FeatureExtractorInceptionV3 = Inception
        monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
        features = load_extractor("torch-fidelity", tmp_path / "weights.pth", CPU)(torch.zeros(2, 3, 8, 8))
        assert features.pool.shape == features.logits.shape == (2, 9)
        assert features.pool[0, 0] == 3  # 2 * mean(0, 1, 2, 3)
        # position by position, 7 of the 9 channels
        assert features.spatial.shape == (2, 4 * 7)
        assert features.spatial[0, :8].tolist() == [0, 4, 8, 12, 16, 20, 24, 1]

    def test_weights_that_hold_more_than_tensors_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("training.evaluation.features._import_torch_fidelity", lambda: pytest.fail)
        torch.save({"path": Path("anything")}, tmp_path / "weights.pth")
        with pytest.raises(ExtractorError, match=r"weights\.pth: UnpicklingError: Weights only"):
            load_extractor("torch-fidelity", tmp_path / "weights.pth", CPU)

    def test_one_of_your_own(self):
        extractor = load_extractor("training.evaluation.features:pixels", None, CPU)
        pool = extractor(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)).pool
        assert torch.equal(pool, torch.full((2, 64), 16.0))

    @pytest.mark.parametrize(
        ("name", "weights", "message"),
        [
            ("vgg", None, "'vgg' is unknown; choose .*torchscript"),
            ("no.such:thing", None, "cannot be imported"),
            ("torchscript", None, "inception-2015-12-05.pt"),
            ("torchscript", "missing.pt", "no weights at missing.pt"),
            ("torchscript", __file__, "no TorchScript file"),
        ],
    )
    def test_errors(self, name, weights, message):
        with pytest.raises(ExtractorError, match=message):
            load_extractor(name, weights and Path(weights), CPU)

    @pytest.mark.parametrize(
        ("extract", "message"),
        [
            (lambda images: images.nothing, "fails on pictures of 8 pixels: AttributeError"),
            (lambda images: images.flatten(1), "AttributeError: 'Tensor' object has no attribute 'pool'"),
            (lambda images: Features(pool=images.float()), r"made \(2, 3, 8, 8\) of two pictures"),
            (lambda images: Features(pool=torch.zeros(2, 6), logits=torch.zeros(1, 4)), r"\(2, 6\), \(1, 4\)"),
        ],
    )
    def test_one_that_does_not_work_is_found_by_trying_it(self, extract, message):
        with pytest.raises(ExtractorError, match=message):
            try_extractor("mine", extract, 8)

    def test_torch_fidelity_without_torchvision(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(ExtractorError, match="needs torchvision in the build .* Or use the torchscript extractor"):
            load_extractor("torch-fidelity", None, CPU)


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
