"""The `transdiff` command, on a tiny saved pipeline: what it writes, what it says, how it fails."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline
from typer.testing import CliRunner, Result

import transdiff_pipelines
from transdiff_pipelines import TransDiffPipeline, cli, loaders


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CHECKPOINT = GOLDEN / "mrar_256.checkpoint-last.pth"
VAE = GOLDEN / "vae.checkpoint-last.pth"
IMAGE_SIDE = 8  # of the tiny pipeline
NUM_CLASSES = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def generate(model: str, *arguments: object) -> Result:
    return run("generate", "--model", model, "--steps", 2, "--device", "cpu", *arguments)


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def assert_one_line_error(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_generate_writes_a_row_for_each_label_and_says_how(model: str) -> None:
    result = generate(model, 4, "goldfish", "--count", 3, "--output", "out.png", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert Image.open("out.png").size == (3 * IMAGE_SIDE, 2 * IMAGE_SIDE)
    assert result.stdout.startswith("out.png: 6 images in ")
    for setting in ("seeds 7 to 12", "guidance 1.3", "drift scale 0.9", "2 steps", "float32 on cpu"):
        assert setting in result.stdout
    assert [path.name for path in Path().iterdir()] == ["out.png"]


def test_generate_without_labels_draws_every_class_of_few(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(model, "--output", "all.png").exit_code == 0
    assert generate(model, *range(NUM_CLASSES), "--output", "named.png").exit_code == 0
    np.testing.assert_array_equal(pixels("all.png"), pixels("named.png"))

    monkeypatch.setattr(cli, "MAX_CLASSES_BY_DEFAULT", NUM_CLASSES - 1)
    assert_one_line_error(generate(model), "5 classes", "transdiff generate goldfish")


def test_a_name_means_its_number(model: str) -> None:
    assert generate(model, 1, "--output", "number.png").exit_code == 0
    assert generate(model, "goldfish", "--output", "name.png").exit_code == 0
    np.testing.assert_array_equal(pixels("number.png"), pixels("name.png"))


def test_image_i_is_drawn_with_seed_plus_i_whatever_the_batch(model: str) -> None:
    assert generate(model, 1, 2, "--count", 2, "--seed", 3, "--output", "together.png").exit_code == 0
    assert generate(model, 1, 2, "--count", 2, "--seed", 3, "--batch-size", 3, "--output", "cut.png").exit_code == 0
    # batches agree to rounding, so within one level of brightness
    assert np.abs(pixels("together.png") - pixels("cut.png")).max() <= 1

    assert generate(model, 2, "--seed", 5, "--output", "third.png").exit_code == 0
    third = pixels("together.png")[IMAGE_SIDE:, :IMAGE_SIDE]
    assert np.abs(third - pixels("third.png")).max() <= 1


@pytest.mark.parametrize(
    ("num_labels", "count", "columns", "rows"),
    [(1, 1, 1, 1), (2, 1, 2, 1), (10, 1, 5, 2), (7, 1, 7, 1), (1, 16, 4, 4), (1, 6, 3, 2), (10, 6, 6, 10)],
)
def test_grid_has_a_row_for_each_label_or_is_nearly_square(
    num_labels: int, count: int, columns: int, rows: int
) -> None:
    number = num_labels * count
    grid = cli._grid([Image.new("RGB", (1, 1), (i, i, i)) for i in range(number)], num_labels, count)
    assert grid.size == (columns, rows)
    assert [grid.getpixel((i % columns, i // columns))[0] for i in range(number)] == list(range(number))


@pytest.mark.parametrize("name", list(cli.SCHEDULER_CLASSES))
def test_scheduler_by_name(model: str, name: str) -> None:
    result = generate(model, 0, "--scheduler", name, "--output", "out.png")
    assert result.exit_code == 0, result.output
    assert cli.SCHEDULER_CLASSES[name] in result.stdout
    assert pixels("out.png").std() > 0


def test_sampling_options_reach_the_sampler(model: str) -> None:
    options = {"--drift-scale": 0.5, "--diffusion-scale": 0.0, "--guidance-scale": 3.0, "--steps": 3}
    assert generate(model, 0, "--output", "plain.png").exit_code == 0
    for option, value in options.items():
        result = generate(model, 0, option, value, "--output", "changed.png")
        assert result.exit_code == 0, result.output
        assert f"{option[2:].replace('-scale', '').replace('drift', 'drift scale')}" in result.stdout
        assert (pixels("changed.png") != pixels("plain.png")).any(), option


def test_one_guidance_for_each_image_of_the_sequence(model: str) -> None:
    scales = [part for value in (1, 1.5, 2, 2.5) for part in ("--guidance-scale", value)]
    result = generate(model, 0, *scales)
    assert result.exit_code == 0, result.output
    assert "guidance [1.0, 1.5, 2.0, 2.5]" in result.stdout
    assert_one_line_error(generate(model, 0, *scales[:4]), "2 values", "4 image")


def test_dtype(model: str) -> None:
    result = generate(model, 0, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["golfish"], ["'golfish'", "did you mean 'goldfish'"]),
        (["0", "5"], ["5 is outside 0..4"]),
        (["0", "--output", "out"], ["'out'", "out.png"]),
        (["0", "--output", "out.doc"], ["'out.doc'", "out.png"]),
        (["0", "--output", "missing/out.png"], ["mkdir -p missing"]),
        (["0", "--output", "folder.png"], ["folder.png is a folder"]),
        (["0", "--model", "./missing"], ["./missing does not exist"]),
        (["0", "--model", "weights.pth"], ["weights.pth is a file", "transdiff convert weights.pth"]),
        (["0", "--model", "zhendch/Transdiff"], ["transdiff convert --repo zhendch/Transdiff"]),
        (["0", "--scheduler", "heun", "--drift-scale", "0.9"], ["--drift-scale", "euler-maruyama"]),
        (["0", "--guidance-scale", "-1"], ["guidance_scale -1.0"]),
        (["0", "--diffusion-scale", "-1"], ["diffusion_scale is -1.0"]),
        (["0", "--device", "abacus"], ["'abacus'", "best is"]),
    ],
)
def test_generate_errors_are_one_line_with_the_remedy(model: str, arguments: list[str], words: list[str]) -> None:
    Path("weights.pth").touch()
    Path("folder.png").mkdir()
    before = set(Path().iterdir())
    assert_one_line_error(generate(model, *arguments), *words)
    assert set(Path().iterdir()) == before


def test_debug_shows_where_an_error_comes_from(model: str) -> None:
    result = generate(model, "golfish", "--debug")
    assert isinstance(result.exception, ValueError)
    assert "golfish" in str(result.exception)


def test_an_unforeseen_error_names_its_type_and_debug(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_draw", lambda *_: {}["key"])
    assert_one_line_error(generate(model, 0), "KeyError: 'key'", "--debug")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--count", "0"],
        ["generate", "--scheduler", "magic"],
        ["generate", "--dtype", "int8"],
        ["generate", "--seed", "-1"],
        ["convert", CHECKPOINT, "--vae", VAE],
        ["convert", "--output", "out"],
        ["convert", CHECKPOINT, "--output", "out"],
        ["convert", CHECKPOINT, "--vae", VAE, "--repo", "owner/name", "--output", "out"],
        ["convert", "--repo", "owner/name", "--output", "out"],
        ["convert", "--repo", "owner/name", "--model", "transdiff_l", "--vae", VAE, "--output", "out"],
        ["paint"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[object]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "--help" in result.stderr
    assert not list(Path().iterdir())


@pytest.mark.parametrize("command", [[], ["generate"], ["convert"]])
def test_help_teaches_with_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    expected = f"  transdiff {command[0]} " if command else "transdiff COMMAND --help"
    assert expected in result.stdout


def test_interrupted_writing_leaves_the_file_that_was_there(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    Path("out.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", half_written)
    assert generate(model, 0, "--output", "out.png").exit_code == 130
    assert [path.name for path in Path().iterdir()] == ["out.png"]
    assert Path("out.png").read_bytes() == b"old"


def test_convert_stores_what_the_converter_returns() -> None:
    result = run("convert", CHECKPOINT, "--vae", VAE, "--num-attention-heads", 2, "--output", "converted")
    assert result.exit_code == 0, result.output
    expected = loaders.convert_original_checkpoint(CHECKPOINT, VAE, num_attention_heads=2)
    stored = TransDiffPipeline.from_pretrained("converted")
    for part in ("condition_encoder", "transformer", "vae"):
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(getattr(stored, part).state_dict()[name], tensor), name
    size = expected.condition_encoder.num_parameters() + expected.transformer.num_parameters()
    assert f"{size:,} parameters" in result.stdout
    assert "transdiff generate 0 --model converted" in result.stdout


def test_convert_dtype_and_preset() -> None:
    options = ["--num-attention-heads", 2, "--preset", "transdiff_l_mrar", "--dtype", "bfloat16"]
    result = run("convert", CHECKPOINT, "--vae", VAE, *options, "--output", "converted")
    assert result.exit_code == 0, result.output
    assert "guidance 1.3, drift scale 0.925, diffusion scale 0.95" in result.stdout
    stored = load_file("converted/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert TransDiffPipeline.from_pretrained("converted").scheduler.config.drift_scale == 0.925


def test_convert_from_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def download(model: str, repo: str) -> tuple[Path, Path]:
        asked_for.append((model, repo))
        return CHECKPOINT, VAE

    monkeypatch.setattr(loaders, "download_original", download)
    options = ["--repo", "owner/name", "--model", "transdiff_b_mrar", "--num-attention-heads", 2]
    result = run("convert", *options, "--output", "converted")
    assert result.exit_code == 0, result.output
    assert asked_for == [("transdiff_b_mrar", "owner/name")]
    assert Path("converted/model_index.json").is_file()


def test_convert_errors_write_nothing() -> None:
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(Path().rglob("*"))
    inputs = ["convert", CHECKPOINT, "--vae", VAE]
    assert_one_line_error(run(*inputs, "--output", "taken"), "taken exists")
    assert_one_line_error(run(*inputs, "--output", "out"), "width 32", "num_attention_heads")
    assert_one_line_error(run("convert", "missing.pth", "--vae", VAE, "--output", "out"), "missing.pth")
    assert_one_line_error(run("convert", VAE, "--vae", VAE, "--output", "out"), "is a VAE")
    download = ["convert", "--repo", "owner/name", "--model", "big", "--output", "out"]
    assert_one_line_error(run(*download), "'big'", "transdiff_l_mrar")
    assert sorted(Path().rglob("*")) == before


def test_version() -> None:
    assert run("--version").stdout == f"transdiff_pipelines {transdiff_pipelines.__version__}\n"


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("transdiff")
    done = subprocess.run([command, "generate", "--model", "./missing"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: model ./missing does not exist"
    )  # libraries may warn before
    assert done.stdout == ""
