"""Values of configurations are read as the types of their fields want them, from a file and from the command line
alike; what could mean two things is refused as it was written.
"""

import math
from pathlib import Path

import pytest
import yaml

from training.settings.config import ConfigError, TrainConfig, build, load_config


MODEL = {"preset": "B"}
MINIMAL = {"output": "run", "model": MODEL, "data": {"vae": "v", "cache": "c"}, "schedule": {"epochs": 1}}


def load(tmp_path: Path, way: str, key: str, text: str) -> TrainConfig:
    """The configuration with `text` as it stands for a key: in the file, or as an override."""
    *sections, last = key.split(".")
    tree: dict = yaml.safe_load(yaml.safe_dump(MINIMAL))
    section = tree
    for name in sections:
        section = section.setdefault(name, {})
    if key == "schedule.steps":
        del section["epochs"]
    if way == "file":
        section[last] = "VALUE"
    else:
        section.pop(last, None)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree).replace("VALUE", text), encoding="utf-8")
    return load_config([f"--config={file}"] + ([f"--{key}={text}"] if way == "override" else []))


def value(config: TrainConfig, key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


both_ways = pytest.mark.parametrize("way", ["file", "override"])


@both_ways
@pytest.mark.parametrize(
    ("key", "text", "meant"),
    [
        ("schedule.steps", "010", 10),
        ("schedule.steps", "1e5", 100_000),
        ("schedule.steps", "1_000", 1000),
        ("schedule.steps", "+7", 7),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "010", 10.0),
        ("optimizer.learning_rate", ".5", 0.5),
        ("data.mirror", "no", False),
        ("data.mirror", "On", True),
        ("compile", "no", "no"),
        ("compile", "off", "no"),
        ("compile", "false", "no"),
        ("output", "2026-11-26", "2026-11-26"),
        ("output", "010", "010"),
        ("output", "1:30", "1:30"),
        ("output", "on", "on"),
        ("output", "a=b", "a=b"),
        ("output", "my runs/exp#3", "my runs/exp#3"),
        ("data.vae", "org/name", "org/name"),
        ("data.subset", "2012", "2012"),
        ("data.split", "train[:10%]", "train[:10%]"),
        ("data.subset", "no", "no"),
        ("data.subset", "null", None),
        ("data.classes", "[no, 01, 1.0, 1e3, 2026-11-26]", ["no", "01", "1.0", "1e3", "2026-11-26"]),
        ("data.classes", '["null", "None", "~"]', ["null", "None", "~"]),
        ("data.classes", "null", None),
        ("preview.labels", "[010, 2]", [10, 2]),
        ("lora.rank", "null", None),
        ("data.subset", "'None'", "None"),
        ("data.images", '""', None),
    ],
)
def test_the_type_of_a_field_decides_how_it_is_read(tmp_path, way: str, key: str, text: str, meant: object) -> None:
    found = value(load(tmp_path, way, key, text), key)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    "text", ["exp #3", "exp: 3", "#3", "*star", "&and", "!bang", "%percent", "a, b", "- a", "a b"]
)
def test_a_path_on_the_command_line_is_the_text_as_it_stands(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, "override", "output", text).output == text
    assert load(tmp_path, "override", "output", f"'{text}'").output == text


PATHS = ("output", "data.images", "data.dataset", "data.vae", "data.cache", "validation.cache", "model.start_from")


@both_ways
@pytest.mark.parametrize("key", [*PATHS, "resume"])
def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, way: str, key: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(MINIMAL, "model", {} if key == "model.start_from" else MODEL)
    assert value(load(tmp_path, way, key, "~/run"), key) == str(tmp_path / "home" / "run")
    assert value(load(tmp_path, way, key, "./~/run"), key) == "./~/run"


@both_ways
@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("None", "./None"),
        ("none", "./none"),
        ("~", "for the home folder"),
        ("~nobody-of-that-name/run", "no user"),
        ("$HOME/run", "$HOME is not replaced"),
        ("${RUN}", "${RUN} is not replaced"),
        ("[a, b]", "path"),
        ("https://example.org/a", "without an address"),
    ],
)
def test_a_path_that_may_mean_something_else_is_refused_as_it_was_written(
    tmp_path, monkeypatch, way, key, text, remedy
) -> None:
    monkeypatch.setitem(MINIMAL, "model", {} if key == "model.start_from" else MODEL)
    with pytest.raises(ConfigError) as error:
        load(tmp_path, way, key, text)
    for part in (key, text.strip("[]").split(", ")[0], remedy):
        assert part in str(error.value)


@both_ways
@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        *((f"optimizer.{name}", text, "expected a number")
          for name in ("learning_rate", "weight_decay", "max_grad_norm") for text in ("inf", ".inf", "nan", "1e999")),
        ("sampling.guidance_scale", "inf", "expected null or a number|expected a number"),
        ("schedule.epochs", "-inf", "expected a number"),
        ("schedule.epochs", "None", "write null"),
        ("schedule.steps", "0x10", "whole number"),
        ("schedule.steps", "0o17", "whole number"),
        ("schedule.steps", "0b1", "whole number"),
        ("schedule.steps", "1:30", "whole number"),
        ("schedule.steps", "1.5", "whole number"),
        ("schedule.steps", "1_0", "whole number"),
        ("schedule.steps", "1,000", "whole number"),
        ("schedule.steps", "1e1000", "whole number"),
        ("schedule.steps", "100k", "whole number"),
        ("schedule.steps", "٣", "whole number"),
        ("data.batch_size", "-5", "must be 1 or more"),
        ("optimizer.learning_rate", "1:30", "a number"),
        ("data.mirror", "1", "true or false"),
        ("data.mirror", "y", "true or false"),
        ("data.mirror", "null", "true or false"),
        ("sharding", "null", "expected no"),
        ("compile", "on", "valid values: no"),
        ("mixed_precision", "BF16", "did you mean 'bf16'"),
        ("data.classes", "cat", "list such as"),
        ("data.classes", "[null]", "expected text"),
        ("data.classes", "[a: b]", "expected text"),
        ("preview.labels", "[1.5]", "whole number"),
        ("preview.labels", "[~]", "whole number"),
        ("seed", "99999999999999999999", "seed"),
        ("output", "null", "expected a path"),
        ("data.subset", "None", "write null"),
    ],
)  # fmt: skip
def test_what_is_no_value_of_the_type_is_refused(tmp_path, way: str, key: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path, way, key, text)
    assert key in str(error.value)


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("key", ["data.cache", "seed", "data.classes", "model.preset"])
def test_an_empty_override_is_refused_and_an_empty_line_of_a_file_is_null(tmp_path, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*empty"):
        load(tmp_path, "override", key, text)
    assert load(tmp_path, "file", "data.subset", text).data.subset is None


@pytest.mark.parametrize("path", [" run", "run ", "a\nb", "a\0b", "caf\udce9", ""])
def test_paths_that_could_not_be_printed_or_stored_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="output is "):
        build(TrainConfig, MINIMAL | {"output": path})


def test_python_values_are_checked_too(tmp_path: Path) -> None:
    assert build(TrainConfig, MINIMAL | {"output": tmp_path}).output == str(tmp_path)
    for key, wrong in (("output", 3), ("seed", 1.5), ("seed", True), ("log_every", "many"), ("data", False)):
        with pytest.raises(ConfigError, match=key):
            build(TrainConfig, MINIMAL | {key: wrong})
    for number in (math.inf, math.nan):
        with pytest.raises(ConfigError, match="learning_rate is (inf|nan)"):
            build(TrainConfig, MINIMAL | {"optimizer": {"learning_rate": number}})


# --- keys ---


def run(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config([f"--config={file}", *overrides])


TEXT = yaml.safe_dump(MINIMAL)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (TEXT + "seed: 1\nseed: 2\n", [], "'seed' stands twice, in lines 9 and 10"),
        (TEXT + "ema: {decay: 0.5, decay: 0.6}\n", [], "'decay' stands twice"),
        (TEXT + "data: {cache: d}\n", [], "'data' stands twice"),
        (TEXT, ["--seed=1", "--seed=2"], "--seed is given twice, as '1' and as '2'"),
        (TEXT, ["--output", "--seed=1"], "--output has no value"),
        (TEXT, ["--data={cache: d}"], "'data' is a section"),
        (TEXT, ["--data=null"], "'data' is a section"),
        (TEXT, ["--data.batch-size=4"], "did you mean 'batch_size'"),
        (TEXT, ["--Seed=4"], "did you mean 'seed'"),
        (TEXT + "ema.decay: 0.5\n", [], "decay is a line of its own, indented under ema:"),
        (TEXT + "ema: false\n", [], "section 'ema' must hold keys"),
        (TEXT + "ema: []\n", [], "section 'ema' must hold keys"),
        ("- a\n", [], "must hold keys and values"),
    ],
)
def test_keys_that_are_misspelt_or_stand_twice_are_errors(tmp_path, text, overrides, words) -> None:
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, text, *overrides)


def test_what_yaml_offers_to_write_things_once_still_works(tmp_path: Path) -> None:
    text = TEXT + "ema: &all {decay: 0.5}\ncheckpoints: {<<: {every: 3, keep: 4}, keep: 5}\npreview:\nsampling: ~\n"
    config = run(tmp_path, text, "--seed", "3")
    assert (config.ema.decay, config.checkpoints.every, config.checkpoints.keep, config.seed) == (0.5, 3, 5, 3)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes("output: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="run.yaml cannot be read as text in UTF-8"):
        load_config([f"--config={file}"])
