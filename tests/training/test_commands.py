"""What every command of training does alike: an output that cannot be written, `~`, values out of range, errors."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import split_images, train_vae
from training.command_line import not_negative, one_line_errors, positive, positive_number, seed
from training.data.errors import DataError


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    """A file, below which nothing can be written by anyone, an administrator included."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one class."""
    for index in range(10):
        path = tmp_path / "images" / "cat" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * index, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def error_of(module: str, arguments: list[object], monkeypatch, capsys) -> str:
    """What a command that fails prints: one line."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main()
    line = capsys.readouterr().err if isinstance(left.value.code, int) else str(left.value.code)
    assert left.value.code not in (0, None)
    assert line.strip().count("\n") == 0, line
    return line


CONFIG = [
    "--config",
    "training/configs/digits_1step.yaml",
    "--data.vae=src/transdiff_pipelines/checkpoints/digits/vae",
]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("training.cache_latents", [*CONFIG, "--data.images=missing", "--data.cache=OUTPUT"]),
        ("training.train", [*CONFIG, "--data.cache=missing", "--output=OUTPUT"]),
        ("training.train", [*CONFIG, "--data.cache=missing", "--output=OUTPUT", "--dry-run"]),
        ("training.split_images", ["--images", "IMAGES", "--output", "OUTPUT"]),
        ("training.train_vae", ["--data", "missing", "--output", "OUTPUT"]),
        ("training.digits.export", ["--output", "OUTPUT"]),
        ("training.emoji.render", ["--output", "OUTPUT", "--packages", "missing"]),
        ("training.evaluate", ["--model", "missing", "--output", "OUTPUT"]),
        ("training.experiments.ar_steps", ["--model", "missing", "--output", "OUTPUT", "--digits", "missing"]),
    ],
)
def test_an_output_that_cannot_be_written_is_the_first_thing_found(
    module, arguments, a_file, folder, monkeypatch, capsys
) -> None:
    """The other arguments name what is not there, so that looking at them first would be another error."""
    names = {"OUTPUT": str(a_file / "output"), "IMAGES": str(folder)}
    arguments = [re.sub("OUTPUT|IMAGES", lambda found: names[found[0]], argument) for argument in arguments]
    line = error_of(module, arguments, monkeypatch, capsys)
    assert f"output {a_file / 'output'} cannot be written" in line
    assert line.strip().endswith("name another place")


def test_a_tilde_is_the_home_folder_in_every_command(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    split_images.main(["--images", "~/images", "--output", "~/split"])
    assert (tmp_path / "split" / "train" / "cat").is_dir()
    options = train_vae.parse(["--data", "~/split", "--output", "~/vae"], "training.train_vae")
    assert (options.data, options.output) == (tmp_path / "split", tmp_path / "vae")
    sources = [path for name in ("training", "benchmarks") for path in Path(name).rglob("*.py")]
    plain = [str(path) for path in sources if "type=Path" in path.read_text(encoding="utf-8")]
    assert not plain, "argparse does not expand ~ with type=Path: use transdiff_pipelines.files.home_path"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"), ("--steps", "-1"), ("--batch-size", "0"), ("--image-size", "0"), ("--latent-channels", "0"),
        ("--learning-rate", "nan"), ("--learning-rate", "0"), ("--kl-weight", "-1"), ("--kl-weight", "inf"),
        ("--seed", "-1"), ("--seed", str(2**70)),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_a_usage_error(option, value, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        train_vae.parse(["--data", "d", "--output", "o", f"{option}={value}"], "training.train_vae")
    assert left.value.code == 2
    assert f"argument {option}: {value!r} is no" in capsys.readouterr().err


def test_numbers_in_their_range_are_fine() -> None:
    assert [positive("3"), positive_number("1e-3"), not_negative("0"), not_negative("0e0"), seed("0")] == [
        3, 0.001, 0, 0, 0,
    ]  # fmt: skip


def test_a_vae_whose_loss_is_not_finite_is_not_written(folder, tmp_path, monkeypatch, capsys) -> None:
    split_images.main(["--images", str(folder), "--output", str(tmp_path / "split")])
    arguments = ["--data", tmp_path / "split", "--output", tmp_path / "vae", "--image-size", 8, "--steps", 9]
    monkeypatch.setattr("sys.stderr", sys.stdout)  # the progress bar goes there, too
    with pytest.raises(SystemExit) as left:
        train_vae.main([*map(str, arguments), "--learning-rate", "1e12"])
    assert left.value.code == 2
    assert "is not finite; lower --learning-rate" in capsys.readouterr().out
    assert not (tmp_path / "vae").exists()


def test_errors_of_the_user_are_one_line_and_others_are_not(capsys) -> None:
    for error in (DataError("no images"), OSError("no space"), KeyError("mine")):
        with pytest.raises(SystemExit) as left, one_line_errors("command", KeyError):
            raise error
        assert left.value.code == 2
        assert capsys.readouterr().err == f"command: {error}\n"
    with pytest.raises(ZeroDivisionError), one_line_errors("command"):
        raise ZeroDivisionError
