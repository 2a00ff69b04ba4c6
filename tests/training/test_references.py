"""What images are measured against: references of every kind, and the extractors of their features."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import small_extractor, write_pictures
from rounding import assert_close

from training.evaluation import references as reference_module
from training.evaluation.features import (
    ExtractorError,
    Features,
    load_extractor,
    try_extractor,
)
from training.evaluation.references import ReferenceImagesError, check_fits, load_reference
from training.evaluation.sampling import (
    read_images,
    write_npz,
)


CPU = torch.device("cpu")


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def cut_off(path):
    """Half of an archive with images."""
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:500])


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
