"""Configurations: what is right is read as meant, what is wrong is an error that tells what would be right."""

from pathlib import Path

import pytest
import yaml

from training.settings.config import ConfigError, TrainConfig, build, load_config, to_dict
from training.settings.schema import settings_that_differ


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SIZES = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_class_tokens": 2,
}
MINIMAL = {"output": "run", "model": SIZES, "data": {"vae": "v", "cache": "c"}, "schedule": {"steps": 10}}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config([f"--config={path}"]).output


def test_overrides_win_over_the_file_and_are_typed(file: str) -> None:
    config = load_config(
        ["--config", file, "--optimizer.learning_rate=1e-3", "--data.mirror", "false", "--preview.labels=[1, 2]"]
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.mirror is False
    assert config.preview.labels == [1, 2]
    assert config.schedule.steps == 10


def test_a_number_with_an_exponent_and_a_bare_no_are_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n  learning_rate: 1e-4\nmixed_precision: no\n")
    config = load_config([f"--config={path}"])
    assert (config.optimizer.learning_rate, config.mixed_precision) == (1e-4, "no")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optimizer.learningrate=1", ["optimizer.learningrate", "'learning_rate'", "weight_decay"]),
        ("--optimiser.beta1=0.9", ["optimiser", "'optimizer'", "schedule"]),
        ("--optimizer.learning_rate=fast", ["optimizer.learning_rate", "'fast'", "a number"]),
        ("--optimizer.learning_rate=-1", ["optimizer.learning_rate", "-1", "positive"]),
        ("--data.batch_size=2.5", ["data.batch_size", "2.5", "a whole number"]),
        ("--data.batch_size=true", ["data.batch_size", "'true'", "a whole number"]),
        ("--data.mirror=1", ["data.mirror", "1", "true or false"]),
        ("--mixed_precision=fp8", ["mixed_precision", "'fp8'", "no, bf16, fp16"]),
        ("--model.frozen=[decoder]", ["model.frozen", "'decoder'", "condition_encoder, transformer"]),
        ("--model.preset=B", ["model.preset", "unset encoder_layers"]),
        ("--model.encoder_layers=null", ["encoder_layers", "preset", "start_from"]),
        ("--schedule.epochs=3", ["one of epochs and steps"]),
        ("--output.folder=x", ["output.folder", "not a section"]),
        ("--data.vae=", ["data.vae"]),
        ("learning_rate=1", ["learning_rate=1", "--key=value"]),
        ("--seed", ["--seed", "no value"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_valid(file: str, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["--config", file, override])
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_and_broken_yaml_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config([f"--config={tmp_path}/none.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config([f"--config={tmp_path}/broken.yaml"])


def test_help_names_every_key(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section, values in to_dict(load_config(["--config", file])).items():
        for name in values if isinstance(values, dict) else []:
            assert f"{section}.{name} = " in text


def test_a_resolved_config_reads_back_as_itself(file: str, tmp_path: Path) -> None:
    config = load_config(["--config", file])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert load_config([f"--config={again}"]) == config


def test_an_override_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.classes: '\[a, b' is not valid YAML; put text"):
        load_config([f"--config={file}", "--data.classes=[a, b"])


def test_a_preview_of_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="preview.labels is empty"):
        build(TrainConfig, MINIMAL | {"preview": {"labels": []}})


def test_of_two_runs_the_settings_are_named_that_may_not_change_when_one_goes_on() -> None:
    changed = MINIMAL | {
        "output": "elsewhere",
        "seed": 7,
        "schedule": {"steps": 20},
        "data": MINIMAL["data"] | {"workers": 4, "mirror": False},
    }
    found = settings_that_differ(build(TrainConfig, MINIMAL), build(TrainConfig, changed))
    assert sorted(found) == ["data.mirror was True, now False", "seed was 0, now 7"]
