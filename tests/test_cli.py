"""`transdiff generate` and `convert`, on a tiny saved pipeline: what they write, what they say, how they fail."""

import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_one_line_error, run
from diffusers import ModelMixin
from pictures import size_of
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_transformer
from typer.testing import Result

from transdiff_pipelines import FlowMapScheduler, TransDiffPipeline, convert_original_checkpoint, generation, loaders
from transdiff_pipelines.generation import SCHEDULER_CLASSES, GenerationSettings


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CHECKPOINT = GOLDEN / "mrar_256.checkpoint-last.pth"
VAE = GOLDEN / "vae.checkpoint-last.pth"
IMAGE_SIDE = 8  # of the tiny pipeline
NUM_CLASSES = 5
GENERATE = import_module("transdiff_cli.generate")  # its function has the same name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(model: str, *arguments: object) -> Result:
    return run("generate", "--model", model, "--steps", 2, "--device", "cpu", *arguments)


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_writes_a_row_for_each_label_and_says_how(model: str) -> None:
    result = generate(model, 4, "goldfish", "--count", 3, "--output", "out.png", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert size_of("out.png") == (3 * IMAGE_SIDE, 2 * IMAGE_SIDE)
    assert result.stdout.startswith("out.png: 6 images in ")
    for setting in ("seeds 7 to 12", "guidance 1.3", "drift scale 0.9", "2 steps", "float32 on cpu"):
        assert setting in result.stdout
    assert [path.name for path in Path().iterdir()] == ["out.png"]


def test_generate_without_labels_draws_every_class_of_few(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(model, "--output", "all.png").exit_code == 0
    assert generate(model, *range(NUM_CLASSES), "--output", "named.png").exit_code == 0
    np.testing.assert_array_equal(pixels("all.png"), pixels("named.png"))

    monkeypatch.setattr(GENERATE, "MAX_CLASSES_BY_DEFAULT", NUM_CLASSES - 1)
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
    grid = generation.image_grid([Image.new("RGB", (1, 1), (i, i, i)) for i in range(number)], count)
    assert grid.size == (columns, rows)
    assert [grid.getpixel((i % columns, i // columns))[0] for i in range(number)] == list(range(number))


@pytest.mark.parametrize("name", [name for name in SCHEDULER_CLASSES if name != "flow-map"])
def test_scheduler_by_name(model: str, name: str) -> None:
    result = generate(model, 0, "--scheduler", name, "--output", "out.png")
    assert result.exit_code == 0, result.output
    assert f"2 steps of {name}, " in result.stdout
    assert pixels("out.png").std() > 0


def test_a_flow_map_is_drawn_with_the_steps_it_recommends(model: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(num_flow_map_layers=1)
    pipe = tiny_pipeline(transformer=transformer, scheduler=FlowMapScheduler(), num_inference_steps=3)
    pipe.save_pretrained(tmp_path / "student")
    result = run("generate", "--model", tmp_path / "student", 0, "--output", "out.png")
    assert result.exit_code == 0, result.output
    assert "3 steps of flow-map, " in result.stdout
    assert GenerationSettings.from_image("out.png").num_inference_steps == 3
    assert "guidance 1.3, 3 steps" in run("info", tmp_path / "student").stdout
    again = run("generate", "--from", "out.png", "--output", "again.png")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels("again.png"), pixels("out.png"))
    assert "100 steps of euler, " in run("generate", "-m", tmp_path / "student", 0, "--scheduler", "euler").stdout
    assert_one_line_error(generate(model, 0, "--scheduler", "flow-map"), "FlowMapScheduler", "velocity model")


def test_sampling_options_reach_the_sampler(model: str) -> None:
    options = {"--drift-scale": 0.5, "--diffusion-scale": 0.0, "--guidance-scale": 3.0, "--steps": 3}
    assert generate(model, 0, "--output", "plain.png").exit_code == 0
    for option, value in options.items():
        result = generate(model, 0, option, value, "--output", "changed.png")
        assert result.exit_code == 0, result.output
        assert f"{option[2:].replace('-scale', '').replace('drift', 'drift scale')}" in result.stdout
        assert (pixels("changed.png") != pixels("plain.png")).any(), option


def test_one_guidance_for_each_image_of_the_sequence(model: str) -> None:
    result = generate(model, 0, "--guidance-scale", "1,1.5,2,2.5")
    assert result.exit_code == 0, result.output
    assert "guidance [1.0, 1.5, 2.0, 2.5]" in result.stdout
    assert_one_line_error(generate(model, 0, "--guidance-scale", "1,1.5"), "2 values", "4 image")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("0 --guidance-scale 1 2 3 4", ["2 3 4 after --guidance-scale 1", "--guidance-scale 1,2,3,4"]),
        ("0 --guidance-scale=1 2 3 4", ["--guidance-scale 1,2,3,4"]),
        ("--guidance-scale 1 2 3 4", ["--guidance-scale 1,2,3,4"]),
        ("0 --guidance-scale 1, 2, 3", ["--guidance-scale 1,2,3"]),
        ("0 --guidance-scale 1 --count 2 3 --guidance-scale 2 4", ["--guidance-scale 2,4"]),
        ("0 --guidance-scale 1,a", ["--guidance-scale", "'1,a' is not a number"]),
        ("0 --guidance-scale 1;2", ["--guidance-scale", "'1;2' is not a number"]),
    ],
)
def test_a_list_of_scales_written_in_another_way_is_noticed(model: str, arguments: str, words: list[str]) -> None:
    """Click took `0 --guidance-scale 1 2 3 4` for a guidance of 1 and four classes."""
    result = generate(model, *arguments.split())
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    for word in words:
        assert word in message
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments", ["--guidance-scale 1.5 0", "--guidance-scale 1.5 -- 0 1", "0 1 -n 2"])
def test_labels_may_follow_options(model: str, arguments: str) -> None:
    assert generate(model, *arguments.split()).exit_code == 0


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
        (["0", "--output", "out.xbm"], ["'out.xbm'", "XBM", "in colour", "out.png"]),
        (["0", "--no-grid", "--output", "{seed}.msp"], ["'{seed}.msp'", "MSP", "in colour"]),
        (["0", "--output", f"{'a' * 250}.png"], ["cannot be written", "too long"]),
        (["0", "--output", "missing/out.png"], ["mkdir -p missing"]),
        (["0", "--output", "folder.png"], ["folder.png is a folder"]),
        (["0", "--output", "{label}.png"], ["add --no-grid"]),
        (["0", "--no-grid", "--output", "{label}-{model}.png"], ["{model}", "{seed}"]),
        (["0", "--no-grid", "-n", "2", "--output", "out.png"], ["2 images", "'out-{seed}.png'"]),
        (["0", "1", "0", "--no-grid", "--output", "{label}.png"], ["3 images", "'{label}-{seed}.png'"]),
        (["0", "--no-grid", "--output", "missing/out"], ["mkdir -p missing"]),
        (["0", "--no-grid", "--output", "{label}/{seed}.png"], ["mkdir -p 0"]),
        (["0", "--no-grid", "--output", "file"], ["file is a file"]),
        (["0", "--from", "missing.png"], ["missing.png"]),
        (["0", "--from", "weights.pth"], ["weights.pth is not a PNG"]),
        (["0", "--count", "100001"], ["100001", "100000"]),
        (["0", "--model", "./missing"], ["./missing does not exist"]),
        (["0", "--model", "weights.pth"], ["weights.pth is a file", "transdiff convert weights.pth"]),
        (["0", "--model", "zhendch/Transdiff"], ["transdiff convert --repo zhendch/Transdiff"]),
        (["0", "--scheduler", "heun", "--drift-scale", "0.9"], ["drift_scale", "euler-maruyama"]),
        (["0", "--guidance-scale", "-1"], ["guidance_scale is -1.0"]),
        (["0", "--diffusion-scale", "-1"], ["diffusion_scale is -1.0"]),
        (["0", "--device", "abacus"], ["'abacus'", "best is"]),
    ],
)
def test_generate_errors_are_one_line_with_the_remedy(model: str, arguments: list[str], words: list[str]) -> None:
    Path("weights.pth").touch()
    Path("file").touch()
    Path("folder.png").mkdir()
    before = set(Path().iterdir())
    assert_one_line_error(generate(model, *arguments), *words)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(("suffix", "count"), [("ico", 33), ("webp", 2048), ("jpg", 8192)])
def test_a_grid_too_large_for_its_format_is_found_before_it_is_drawn(
    model: str, monkeypatch: pytest.MonkeyPatch, suffix: str, count: int
) -> None:
    """Formats have limits of their own; an .ico above 256 pixels was shrunk without a word."""
    monkeypatch.setattr(generation, "draw", lambda *_: pytest.fail("drawn before the format was tried"))
    result = generate(model, 0, 1, "--count", count, "--output", f"out.{suffix}")
    assert_one_line_error(result, f"'out.{suffix}'", f"{count * IMAGE_SIDE} x {2 * IMAGE_SIDE} pixels", "fewer images")
    assert not list(Path().iterdir())


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("loaded first"))
    for output in (["out.png"], ["folder", "--no-grid"], ["{label}.png", "--no-grid"]):
        result = generate(model, 0, "--output", *output)
        assert_one_line_error(result, "cannot be written: Permission denied", "name another place")


def test_paths_begin_at_home_where_no_shell_says_so(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert generate(model, 0, "--output=~/out.png").exit_code == 0
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["out.png"]
    again = run("generate", "--from=~/out.png", "--device", "cpu", "--output=~/again.png")
    assert again.exit_code == 0, again.output


def test_a_training_run_is_named_by_its_folder(model: str, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    Path("outputs/run").mkdir()
    Path("outputs/run/pipeline").symlink_to(model)
    assert generate("outputs/run", 0, "--output", "run.png").exit_code == 0
    assert run("info", "outputs/run").stdout.startswith("outputs/run/pipeline: TransDiffPipeline")
    assert_one_line_error(generate("outputs", 0), "outputs is a folder without model_index.json", "pipeline/")


def test_debug_shows_where_an_error_comes_from(model: str) -> None:
    result = generate(model, "golfish", "--debug")
    assert isinstance(result.exception, ValueError)
    assert "golfish" in str(result.exception)


def test_an_unforeseen_error_names_its_type_and_debug(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "draw", lambda *_: {}["key"])
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


def test_interrupted_writing_leaves_the_file_that_was_there(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def half_written(self: Image.Image, file: object, **options: object) -> None:
        if not isinstance(file, Path):  # the format is tried in memory
            return save(self, file, **options)
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    Path("out.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", half_written)
    assert generate(model, 0, "--output", "out.png").exit_code == 130
    assert [path.name for path in Path().iterdir()] == ["out.png"]
    assert Path("out.png").read_bytes() == b"old"


def test_single_files(model: str) -> None:
    assert generate(model, 4, 1, "-n", 2, "--seed", 7, "--batch-size", 4, "--output", "grid.png").exit_code == 0
    for output, names in (
        ("folder", ["4-7.png", "4-8.png", "1-9.png", "1-10.png"]),
        ("folder/{number}-{label}.png", ["0-4.png", "1-4.png", "2-1.png", "3-1.png"]),
    ):
        options = ["-n", 2, "--seed", 7, "--no-grid", "--batch-size", 4, "--output", output]
        result = generate(model, 4, 1, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"folder/{names[0]} to folder/{names[-1]}: 4 images in ")
        singles = [pixels(f"folder/{name}") for name in names]
        rows = [np.concatenate(singles[:2], axis=1), np.concatenate(singles[2:], axis=1)]
        np.testing.assert_array_equal(np.concatenate(rows), pixels("grid.png"))
    assert len(list(Path("folder").iterdir())) == 8


def test_each_single_file_is_drawn_again_to_the_bit(model: str) -> None:
    assert generate(model, 4, 1, "-n", 2, "--seed", 7, "--no-grid").exit_code == 0
    for path in ("transdiff-4-8.png", "transdiff-1-10.png"):
        again = run("generate", "--from", path, "--device", "cpu", "--output", "again.png")
        assert again.exit_code == 0, again.output
        assert Path("again.png").read_bytes() == Path(path).read_bytes()


def test_a_grid_is_drawn_again_to_the_bit_with_every_setting(model: str) -> None:
    scales = ["--guidance-scale", "1,1.5,2,2.5"]
    sampler = ["--scheduler", "sde-multistep", "--drift-scale", 0.8, "--diffusion-scale", 0.7]
    options = [*scales, *sampler, "-n", 3, "--seed", 5, "--dtype", "bfloat16", "--batch-size", 2]
    assert generate(model, "goldfish", 4, *options, "--output", "out.png").exit_code == 0
    assert GenerationSettings.from_image("out.png") == GenerationSettings(
        labels=(1, 4),
        model=model,
        count=3,
        seed=5,
        guidance_scale=(1.0, 1.5, 2.0, 2.5),
        num_inference_steps=2,
        scheduler="sde-multistep",
        drift_scale=0.8,
        diffusion_scale=0.7,
        dtype="bfloat16",
        batch_size=2,
    )
    again = run("generate", "--from", "out.png", "--device", "cpu", "--output", "again.png")
    assert again.exit_code == 0, again.output
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()

    # The command in words does the same.
    command = shlex.split(GenerationSettings.from_image("out.png").command_line())
    assert command[0] == "transdiff"
    assert run(*command[1:], "--device", "cpu", "--output", "typed.png").exit_code == 0
    assert Path("typed.png").read_bytes() == Path("out.png").read_bytes()


def test_what_the_model_recommends_is_stored_too(model: str) -> None:
    assert generate(model, 0, "--output", "out.png").exit_code == 0
    stored = GenerationSettings.from_image("out.png")
    assert (stored.guidance_scale, stored.drift_scale, stored.diffusion_scale) == (1.3, 0.9, 0.95)
    assert stored.scheduler == "euler-maruyama"


def test_options_replace_what_an_image_stores(model: str) -> None:
    assert generate(model, 0, 1, "--output", "out.png").exit_code == 0
    stored = GenerationSettings.from_image("out.png")
    for options, changes in (
        (["--seed", 3], {"seed": 3}),
        (["--seed", 0], {}),
        ([2], {"labels": (2,)}),
        (["--scheduler", "heun"], {"scheduler": "heun", "drift_scale": None, "diffusion_scale": None}),
        (["--scheduler", "sde-multistep"], {"scheduler": "sde-multistep"}),
    ):
        result = run("generate", *options, "--from", "out.png", "--device", "cpu", "--output", "again.png")
        assert result.exit_code == 0, result.output
        assert GenerationSettings.from_image("again.png") == replace(stored, **changes)


def test_from_says_what_it_will_do_and_which_version_drew(model: str) -> None:
    settings = GenerationSettings(labels=(0,), model=model, num_inference_steps=2, version="0.0.1")
    Image.new("RGB", (1, 1)).save("old.png", pnginfo=settings.png_info())
    result = run("generate", "--from", "old.png", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "version 0.0.1" in result.stderr
    assert f"transdiff generate 0 --model {model}" in result.stderr

    result = run("generate", 2, "goldfish", "--from", "old.png", "--device", "cpu")
    assert f"transdiff generate 2 goldfish --model {model}" in result.stderr  # the labels that are drawn


def test_other_formats_keep_no_settings_and_say_so(model: str) -> None:
    result = generate(model, 0, "--output", "out.webp")
    assert result.exit_code == 0, result.output
    assert "only a PNG keeps its settings; again: transdiff generate 0 --model" in result.stdout
    assert "only a PNG" not in generate(model, 0).stdout


def test_compile_asks_for_compiled_blocks_of_both_models(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(
        ModelMixin, "compile_repeated_blocks", lambda self, *args, **kwargs: compiled.append(type(self).__name__)
    )
    assert generate(model, 0).exit_code == 0
    assert compiled == []
    assert generate(model, 0, "--compile").exit_code == 0
    assert compiled == ["ARConditionEncoder", "TransDiffTransformer2DModel"]


def test_interrupted_single_files_are_whole(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def interrupted_at_the_third(self: Image.Image, file: object, **options: object) -> None:
        if isinstance(file, Path) and len(list(Path().glob("*.png"))) == 2:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted_at_the_third)
    assert generate(model, 0, "-n", 4, "--no-grid").exit_code == 130
    assert sorted(path.name for path in Path().iterdir()) == ["transdiff-0-0.png", "transdiff-0-1.png"]
    assert {size_of(path) for path in Path().iterdir()} == {(IMAGE_SIDE, IMAGE_SIDE)}


def test_convert_stores_what_the_converter_returns() -> None:
    result = run("convert", CHECKPOINT, "--vae", VAE, "--num-attention-heads", 2, "--output", "converted")
    assert result.exit_code == 0, result.output
    expected = convert_original_checkpoint(CHECKPOINT, VAE, num_attention_heads=2)
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
    missing = ["convert", "missing.pth", "--vae", VAE]
    assert_one_line_error(run(*missing, "--output", "taken/file/out"), "output taken/file/out cannot be written")
    assert_one_line_error(run(*missing, "--output", "out", "--preset", "XL"), "'XL'", "transdiff_l_mrar")
    assert sorted(Path().rglob("*")) == before
