"""The `transdiff` command as a whole, and its subcommands info, demo, train and evaluate."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from command import assert_one_line_error, run
from tiny import tiny_pipeline

import transdiff_pipelines
from training.evaluate import parse
from transdiff_pipelines import DIGITS, EMOJI, TransDiffPipeline, generation, sources


ROOT = Path(__file__).parents[1]
COMMANDS = ["generate", "info", "demo", "convert", "train", "evaluate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = re.findall(rf"^ +(transdiff {command} .*)", result.stdout, re.MULTILINE)
    assert len(examples) >= 2, result.stdout
    # Every option of an example is one of the command's.
    listed = result.stdout.split("Options:")[1]
    for option in re.findall(r"(?<= )--?[a-z-]+", " ".join(examples)):
        assert re.search(rf"{option}\b", listed), option


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "transdiff COMMAND --help" in result.stdout
    assert [name for name in COMMANDS if re.search(rf"^  {name} ", result.stdout, re.MULTILINE)] == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["generate", "--help"], 0), (["--version"], 0), (["generate", "-n0"], 2)]
)
def test_help_version_and_usage_errors_do_without_torch(arguments: list[str], code: int) -> None:
    program = "import atexit, sys, transdiff_cli\natexit.register(lambda: print(*sys.modules))\ntransdiff_cli.main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "transdiff_cli.generate" in modules
    assert not {"torch", "diffusers", "transdiff_pipelines"} & set(modules)


def test_version() -> None:
    assert run("--version").stdout == f"transdiff_pipelines {transdiff_pipelines.__version__}\n"


def test_choices_are_those_of_the_package() -> None:
    assert get_args(import_module("transdiff_cli.generate").SchedulerName) == tuple(generation.SCHEDULER_CLASSES)
    assert get_args(import_module("transdiff_cli.common").DType) == generation.DTYPES
    assert import_module("transdiff_cli.common").MODEL_HELP.endswith(f": {', '.join(sources.BUNDLED)}.")


@pytest.mark.usefixtures("_in_empty_folder")
def test_errors_of_a_process_of_its_own() -> None:
    program = "from transdiff_cli import main; main()"
    command = [sys.executable, "-c", program, "generate", "--model", "./missing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    # libraries may warn before
    assert done.stderr.splitlines()[-1].startswith("error: model ./missing does not exist")
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["info"], ["generate", "3", "--steps", "1"]])
@pytest.mark.usefixtures("_in_empty_folder")
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    """As in `transdiff info | head -1`; here the reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "transdiff_cli", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "roken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_command_is_this_one() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    module, function = re.search(r"transdiff = ([\w.]+):(\w+)", setup).groups()
    assert getattr(import_module(module), function) is import_module("transdiff_cli").main


def test_info_of_a_pipeline(model: str) -> None:
    result = run("info", model)
    assert result.exit_code == 0, result.output
    pipe = tiny_pipeline()
    for name in ("condition_encoder", "transformer", "vae"):
        part = getattr(pipe, name)
        assert re.search(rf"{name} +{type(part).__name__} +{part.num_parameters():,} parameters", result.stdout), name
    assert re.search(r"scheduler +FlowMatchEulerMaruyamaScheduler\n", result.stdout)
    assert "images: 8 x 8 pixels, MRAR, 4 to a sequence" in result.stdout
    assert "recommended: guidance 1.3, drift scale 0.9, diffusion scale 0.95, 100 steps" in result.stdout
    assert re.search(r"classes: 5\n +0  tench, Tinca tinca\n +1  goldfish\n", result.stdout)


def test_info_reads_no_weights(model: str, tmp_path: Path) -> None:
    for path in Path(model).rglob("*.json"):
        copy = tmp_path / path.relative_to(model)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert run("info", tmp_path).stdout.splitlines()[1:] == run("info", model).stdout.splitlines()[1:]


def test_info_without_a_model_is_that_of_the_bundled_digits() -> None:
    assert run("info").stdout == run("info", DIGITS).stdout != ""


def test_info_lists_the_first_names_of_the_bundled_emoji_in_order() -> None:
    result = run("info", "emoji")
    assert "images: 64 x 64 pixels, MRAR, 4 to a sequence" in result.stdout
    names = TransDiffPipeline.load_config(EMOJI)["id2label"]
    listed = re.findall(r"^ +(\d+)  (.+)$", result.stdout, re.MULTILINE)
    assert [int(class_id) for class_id, _ in listed] == list(range(60))
    assert dict(listed).items() <= names.items()
    assert f"{len(names) - 60} more: transdiff info emoji --search TEXT" in result.stdout
    assert run("info", "emoji", "--search", "face dog").stdout.split("  ")[-1] == "dog face\n"


def test_info_search(model: str) -> None:
    assert run("info", model, "--search", "CRANE").stdout == "     2  crane, bird\n     3  crane, machine\n"
    assert run("info", model, "-s", "bird crane").stdout == "     2  crane, bird\n"
    assert run("info", model, "-s", "4").stdout == "     4  zebra\n"
    assert_one_line_error(run("info", model, "-s", "golfish"), "'golfish'", "did you mean 'goldfish'")


def test_info_shows_the_first_of_many_classes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("transdiff_cli.info"), "MAX_CLASSES_SHOWN", 2)
    result = run("info", model)
    assert "goldfish" in result.stdout
    assert "crane" not in result.stdout
    assert f"3 more: transdiff info {model} --search TEXT" in result.stdout
    assert "zebra" in run("info", model, "--search", "e").stdout


@pytest.mark.usefixtures("_in_empty_folder")
def test_info_errors() -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    Path("weights.pth").touch()
    assert_one_line_error(run("info", "./missing"), "./missing does not exist")
    assert_one_line_error(run("info", "empty"), "model_index.json", "empty")
    assert_one_line_error(run("info", "other"), "DDPMPipeline", "TransDiff")
    assert_one_line_error(run("info", "weights.pth"), "transdiff convert weights.pth")
    assert_one_line_error(run("info", "zhendch/Transdiff"), "transdiff convert --repo zhendch/Transdiff")


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    page = ModuleType("transdiff_pipelines.demo")
    page.launch = lambda *arguments: launched.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setattr(import_module("transdiff_cli.demo"), "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, page.__name__, page)
    assert run("demo").exit_code == 0
    assert run("demo", "-m", "FOLDER", "--host", "0.0.0.0", "--port", 8000, "--share").exit_code == 0
    assert launched == [(None, "127.0.0.1", None, False), ("FOLDER", "0.0.0.0", 8000, True)]


def test_demo_without_gradio_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_one_line_error(run("demo"), 'pip install "transdiff_pipelines[demo]"')


def test_train_prints_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    listed = run("train").stdout.splitlines()
    assert "transdiff train training/configs/digits_mrar.yaml" in listed
    assert len(listed) == 2 * len(list((ROOT / "training/configs").glob("*.yaml")))
    purpose = listed[listed.index("transdiff train training/configs/lora.yaml") - 1]
    assert purpose.startswith("# LoRA: small adapters on the frozen weights of start_from")
    assert all(line.startswith("# ") and 20 < len(line) < 200 for line in listed[::2])

    result = run("train", "training/configs/digits_mrar.yaml")
    assert result.exit_code == 0
    commands = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    for command, module in zip(commands, ("training.cache_latents", "training.train"), strict=True):
        assert command == f"accelerate launch -m {module} --config training/configs/digits_mrar.yaml"


def test_evaluate_prints_a_command_that_training_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run("evaluate", "models/my model", "--reference", "ref.npz", "--num-images", 100)
    assert result.exit_code == 0
    (command,) = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    launcher, arguments = shlex.split(command)[:4], shlex.split(command)[4:]
    assert launcher == ["accelerate", "launch", "-m", "training.evaluate"]
    options = parse(arguments)
    assert (options.model, options.reference, options.num_images) == ("models/my model", "ref.npz", 100)
    assert options.extractor == "torch-fidelity"  # without one nothing would be measured
    assert options.output == Path("eval/my model")


@pytest.mark.usefixtures("_in_empty_folder")
def test_train_and_evaluate_outside_a_checkout() -> None:
    assert_one_line_error(run("train", "config.yaml"), "training/train.py", "checkout", 'pip install -e ".[train]"')
    assert_one_line_error(run("evaluate", "FOLDER"), "training/evaluate.py", "checkout")


def test_train_with_a_missing_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert_one_line_error(run("train", "digits.yaml"), "digits.yaml", "training/configs/digits_1step.yaml")


@pytest.mark.parametrize(
    "arguments", [["info", "a", "b"], ["demo", "--port", "0"], ["evaluate"], ["evaluate", "m", "--num-images", "0"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "--help" in result.stderr
