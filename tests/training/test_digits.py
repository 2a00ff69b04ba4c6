"""The digits data set, the laws its quality measures obey, and the VAE's training script."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import size_of
from PIL import Image
from sklearn.datasets import load_digits

from training.data.splits import SPLITS, split_indices
from training.digits import quality
from training.digits import train_vae as train_digits_vae
from training.digits.export import block_means, export, main
from training.evaluation.quality import (
    frechet_distance,
    nearest_neighbour_distance,
    summarise,
    within_class_variance,
)
from training.model.autoencoder import VAESettings, VAETrainer, build_vae, reconstruct, to_tensor
from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)
from transdiff_pipelines.files import new_file


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    main(["--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def pixels(digits: Path) -> tuple[np.ndarray, np.ndarray]:
    return quality.load_pixels(digits, "train")


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_export_is_deterministic(digits: Path, tmp_path: Path) -> None:
    export(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing temporary is left


def test_splits_are_disjoint_complete_and_stratified() -> None:
    labels = load_digits().target
    splits = split_indices(labels)
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(len(labels)))
    for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        counts = np.bincount(labels[splits[name]], minlength=10)
        assert np.abs(counts - share * np.bincount(labels)).max() <= 2


def test_files_are_named_after_their_source_and_pool_back_to_it(digits: Path) -> None:
    source = load_digits()
    paths = sorted(digits.rglob("*.png"))
    assert len(paths) == len(source.images)
    errors = []
    for path in paths:
        image = Image.open(path)
        assert (image.size, image.mode) == ((32, 32), "L")
        assert source.target[int(path.stem)] == int(path.parent.name)
        errors.append(block_means(np.asarray(image) * (16 / 255)) - source.images[int(path.stem)])
    assert np.sqrt(np.square(errors).mean()) < 0.06  # of 16; clipping leaves a little
    assert np.abs(errors).max() < 0.6


def test_export_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def write_half() -> None:
        with new_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_data_are_reported_with_the_command_that_writes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.digits\.export"):
        quality.load_split(tmp_path, "train")


def test_pooled_pixels_are_block_means_in_0_to_16() -> None:
    small = np.random.default_rng(0).random((3, 8, 8))
    images = small.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=-1)
    np.testing.assert_allclose(quality.pooled_pixels(images), small.reshape(3, 64) * 16)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        quality.pooled_pixels(small)


def test_frechet_distance_laws(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    features = pixels[0]
    shift = np.linspace(-1, 1, 64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(features + shift, features) == pytest.approx(np.square(shift).sum(), rel=1e-3)
    # Equal means and S' = 4 S: tr(S + 4 S - 2 * 2 S) = tr(S).
    spread = features.mean(axis=0) + 2 * (features - features.mean(axis=0))
    assert frechet_distance(spread, features) == pytest.approx(features.var(axis=0, ddof=1).sum(), rel=1e-3)
    half, other = features[::2], features[1::2]
    assert frechet_distance(half, other) == pytest.approx(frechet_distance(other, half), rel=1e-4)


def test_nearest_neighbour_distance_laws(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    features = pixels[0]
    assert nearest_neighbour_distance(features, features).max() == 0
    far = np.full((1, 64), 100.0)
    expected = np.linalg.norm(features - far, axis=1).min()
    np.testing.assert_allclose(nearest_neighbour_distance(far, features), [expected])


def test_within_class_variance_ignores_what_separates_classes() -> None:
    random = np.random.default_rng(0)
    labels = quality.balanced_labels(4000)
    noise = random.normal(size=(4000, 64))
    assert within_class_variance(noise + 50 * labels[:, None], labels) == pytest.approx(64, rel=0.02)
    assert within_class_variance(np.zeros((4000, 64)) + labels[:, None], labels) == 0


def test_real_digits_are_recognised_and_shuffled_labels_are_not(digits: Path) -> None:
    reference = quality.Reference(digits, "validation")
    real = reference.measure_real()
    assert real["recognition"] > 0.96
    assert real["copies"] <= 0.02
    wrong = reference.measure(reference.pixels, (reference.labels + 1) % 10)
    assert wrong["recognition"] < 0.04
    assert wrong["frechet"] == pytest.approx(0, abs=1e-3)


def test_copied_training_images_are_called_copies(digits: Path, pixels: tuple[np.ndarray, np.ndarray]) -> None:
    reference = quality.Reference(digits, "test")
    assert reference.fit_on == ("train", "validation")
    copied = reference.measure(*pixels)
    assert copied["copies"] == 1
    assert copied["nearest"] == 0


def test_balanced_labels() -> None:
    assert np.bincount(quality.balanced_labels(30)).tolist() == [3] * 10
    with pytest.raises(ValueError, match="25"):
        quality.balanced_labels(25)


def test_summary_over_seeds() -> None:
    mean, spread = summarise([{"recognition": 1.0}, {"recognition": 3.0}])
    assert (mean["recognition"], spread["recognition"]) == (2.0, pytest.approx(np.sqrt(2)))
    assert summarise([{"recognition": 1.0}])[1] == {"recognition": 0.0}


def test_vae_script_saves_a_loadable_autoencoder(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "few"
    for split in SPLITS:
        for label in range(10):
            folder = data / split / str(label)
            folder.mkdir(parents=True)
            for path in sorted((digits / split / str(label)).iterdir())[:2]:
                (folder / path.name).symlink_to(path)
    train_digits_vae.main([f"--data={data}", f"--output={tmp_path / 'vae'}", "--steps=2", "--batch-size=4"])

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    report = json.loads((tmp_path / "vae" / "report.json").read_text())
    assert vae.config.scaling_factor == pytest.approx(1 / report["latents"]["std"], abs=1e-4)
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, 4, 4, 4)
    assert (tmp_path / "vae" / "preview.png").exists()


def test_vae_training_lowers_the_error() -> None:
    torch.manual_seed(0)
    vae = build_vae()
    random = np.random.default_rng(0)
    images = np.repeat(random.random((8, 1, 1, 3)), 32, axis=1).repeat(32, axis=2).astype(np.float32)
    before = np.square(reconstruct(vae, images) - images).mean()
    VAETrainer(vae, to_tensor(images), VAESettings(steps=25, batch_size=8, kl_weight=1e-4)).run()
    after = np.square(reconstruct(vae, images) - images).mean()
    assert after < before / 2


def tiny_pipeline() -> TransDiffPipeline:
    torch.manual_seed(0)
    size = {"sample_size": 4, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    return TransDiffPipeline(
        ARConditionEncoder(num_classes=10, num_class_tokens=2, patch_size=1, **size),
        TransDiffTransformer2DModel(patch_size=1, cross_attention_dim=16, **size),
        build_vae(),
        FlowMatchEulerMaruyamaScheduler(drift_scale=0.9, diffusion_scale=0.8),
        guidance_scale=1.5,
    )


def test_quality_script_measures_a_saved_pipeline(digits: Path, tmp_path: Path, capsys) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--num-images=20", "--num-inference-steps=2", "--diffusion-scale=0.5", "--seeds", "3", "4", "3"]
    files = [f"--output={tmp_path / 'result.json'}", f"--grid={tmp_path / 'grid.png'}"]
    quality.main([f"--model={tmp_path / 'model'}", f"--data={digits}", *options, *files])

    result = json.loads((tmp_path / "result.json").read_text())
    settings = {"guidance_scale": 1.5, "num_inference_steps": 2, "drift_scale": 0.9, "diffusion_scale": 0.5}
    settings |= {"scheduler": "FlowMatchEulerMaruyamaScheduler", "dtype": "float32"}
    assert result["settings"] == settings  # the checkpoint's own where nothing is said
    assert [run["seed"] for run in result["runs"]] == [3, 4, 3]
    first, second, again = (run["frechet"] for run in result["runs"])
    assert first == again != second  # a seed settles the images
    assert result["mean"]["recognition"] < 0.5 < result["real"]["recognition"]  # untrained
    assert result["mean"]["frechet"] > 10 * result["real"]["frechet"]
    assert size_of(tmp_path / "grid.png") == (320, 64)
    assert f"| {100 * result['real']['recognition']:.2f} |" in capsys.readouterr().out

    options = ["--num-images=20", "--num-inference-steps=2", "--seeds=3", "--scheduler=unipc", files[0]]
    quality.main([f"--model={tmp_path / 'model'}", f"--data={digits}", *options])
    other = json.loads((tmp_path / "result.json").read_text())
    assert other["settings"]["scheduler"] == "UniPCMultistepScheduler"
    assert other["runs"][0]["frechet"] != first
