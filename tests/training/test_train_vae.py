"""Training a VAE in pieces, and its options: training/model/autoencoder.py, training/train_vae.py."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from training import train_vae
from training.data.errors import DataError
from training.distributed.interruption import TrainingInterrupted
from training.model.autoencoder import VAESettings, VAETrainer, build_vae


SETTINGS = {"steps": 6, "batch_size": 3, "mirror": True}


def trainer(seed: int = 0, **settings: object) -> VAETrainer:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = build_vae(latent_channels=2, image_size=16, widths=(8, 8, 8))
    return VAETrainer(vae, images, VAESettings(**{**SETTINGS, **settings}), seed)


def stopped_at(step: int, checkpoint: Path) -> VAETrainer:
    """A trainer that SIGTERM has stopped after `step` steps."""
    stopped = trainer()
    take = stopped._train_step

    def step_and_signal() -> tuple[float, float]:
        result = take()
        if stopped.step == step:
            signal.raise_signal(signal.SIGTERM)
        return result

    stopped._train_step = step_and_signal
    with pytest.raises(TrainingInterrupted, match=f"after step {step}, which is saved in"):
        stopped.run(checkpoint)
    return stopped


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("step", [1, 3])  # in the middle of an epoch, and in the middle of the next one
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, step: int) -> None:
    whole = trainer()
    whole.run()
    stopped_at(step, tmp_path / "vae.unfinished")
    continued = trainer()
    continued.run(tmp_path / "vae.unfinished")
    for name, weight in whole.vae.state_dict().items():
        assert torch.equal(weight, continued.vae.state_dict()[name]), name


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "vae.unfinished")
    with pytest.raises(DataError, match="with kl_weight 0.003, now it is 0.1; repeat the options"):
        trainer(kl_weight=0.1).run(tmp_path / "vae.unfinished")


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae.unfinished").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no checkpoint of a VAE.*remove it"):
        trainer().run(tmp_path / "vae.unfinished")


def test_bfloat16_leaves_weights_in_float32_and_learns() -> None:
    small = trainer(bfloat16=True, steps=20, loss="l1", kl_weight=0.0)
    with torch.no_grad():
        before = (small.vae(small.images).sample - small.images).abs().mean()
    small.run()
    with torch.no_grad():
        after = (small.vae(small.images).sample - small.images).abs().mean()
    assert after < before
    assert {weight.dtype for weight in small.vae.parameters()} == {torch.float32}


def test_a_decoder_alone_is_trained() -> None:
    small = trainer(decoder_only=True)
    before = {name: weight.clone() for name, weight in small.vae.state_dict().items()}
    small.run()
    changed = {name.split(".")[0] for name, weight in small.vae.state_dict().items() if not weight.equal(before[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Options that name images and an output."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        picture = Image.effect_noise((16, 16), 90).convert("RGB")
        picture.save(tmp_path / "images" / split / "a" / "1.png")
    return [f"--data={tmp_path / 'images'}", "--image-size=16", "--steps=2", "--batch-size=1"]


def test_a_decoder_trained_further_leaves_the_latents_as_they_are(tmp_path: Path, folders: list[str]) -> None:
    first, second = tmp_path / "vae", tmp_path / "further"
    train_vae.main([*folders, f"--output={first}", "--widths", "8", "8", "--latent-channels=3"])
    train_vae.main([*folders, f"--output={second}", f"--decoder-of={first}"])
    vae, further = (AutoencoderKL.from_pretrained(folder) for folder in (first, second))
    assert further.config.scaling_factor == vae.config.scaling_factor
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.encode(images).latent_dist.parameters, further.encode(images).latent_dist.parameters)
    latents = vae.encode(images).latent_dist.mean
    assert not torch.equal(vae.decode(latents).sample, further.decode(latents).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "8", "8"], "--widths: the VAE of --decoder-of has its own sizes; leave it out"),
        (["--widths", "8", "8", "--latent-channels=3"], "--latent-channels and --widths: the VAE of"),
        ([], "--decoder-of: there is no folder outputs/no_vae"),
    ],
)
def test_what_does_not_fit_a_finished_vae_is_named(
    tmp_path: Path, folders: list[str], options: list[str], message: str, capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_vae.main([*folders, f"--output={tmp_path / 'further'}", "--decoder-of=outputs/no_vae", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("widths", [["16"], ["16", "20"]])
def test_widths_that_do_not_work_are_named(tmp_path: Path, widths: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_vae.main([f"--data={tmp_path}", f"--output={tmp_path / 'vae'}", "--widths", *widths])
    assert f"--widths {' '.join(widths)}: expected at least two multiples of 8" in capsys.readouterr().err
