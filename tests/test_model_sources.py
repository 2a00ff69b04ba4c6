"""What a model's name stands for, and which bundled model draws labels where none is named."""

from pathlib import Path

import pytest
from command import assert_one_line_error, run
from tiny import tiny_pipeline

from transdiff_pipelines import DIGITS, EMOJI, TransDiffPipeline, generation, model_card
from transdiff_pipelines.attribution import ATTRIBUTION_NAME, WORKS, attribution
from transdiff_pipelines.generation import GenerationSettings
from transdiff_pipelines.sources import BUNDLED, model_for_labels, model_source


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("labels", "model"),
    [
        ([], None),
        (["3", "7"], None),
        (["11"], None),
        (["-3"], None),
        (["pizza"], "emoji"),
        (["dog face", "key"], "emoji"),
    ],
)
def test_labels_find_the_model_that_draws_them(labels: list[str], model: str | None) -> None:
    assert model_for_labels(labels) == model


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["clock"], ["'clock'", "nearest names are 'alarm clock'", "transdiff info emoji", "--model"]),
        (["pizza", "dog face", "lightbulb"], ["'lightbulb'", "'light bulb'"]),
        (["3", "pizzza"], ["'pizzza'", "'pizza'", "digits draws 0 to 9"]),
        (["3", "pizza"], ["both '3' and 'pizza'", "digits draws 0 to 9", "emoji knows 'pizza'", "--model"]),
        (["golden retriever"], ["no bundled model draws 'golden retriever'", "--model"]),
        (["42"], ["42 is outside 0..9"]),
    ],
)
def test_labels_that_no_bundled_model_draws(labels: list[str], words: list[str]) -> None:
    assert_one_line_error(run("generate", *labels, "--steps", 1), *words)
    assert not list(Path().iterdir())


def test_it_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("loaded first"))
    assert_one_line_error(run("generate", "3", "pizza"), "both '3' and 'pizza'")


def test_a_picture_of_emoji_says_which_model_drew_it() -> None:
    drawn = run("generate", "dog face", "pizza", "--scheduler", "unipc", "--steps", 1, "--output", "emoji.png")
    assert drawn.exit_code == 0, drawn.output
    settings = GenerationSettings.from_image("emoji.png")
    assert settings.model == "emoji"
    assert " --model emoji " in settings.command_line()
    assert run("generate", "--from", "emoji.png", "--output", "again.png").exit_code == 0
    assert Path("again.png").read_bytes() == Path("emoji.png").read_bytes()


def test_a_picture_keeps_its_model_whatever_the_labels() -> None:
    """Its steps and scales are those of its model."""
    assert run("generate", 3, "--scheduler", "unipc", "--steps", 1, "--output", "three.png").exit_code == 0
    assert GenerationSettings.from_image("three.png").model is None
    assert_one_line_error(run("generate", "--from", "three.png", "pizza"), "drawn by the digits", "--model emoji")
    assert run("generate", "--from", "three.png", "pizza", "--model", "emoji").exit_code == 0


def test_emoji_are_too_many_to_draw_all_unasked() -> None:
    example = "e.g. transdiff generate '1st place medal'"
    assert_one_line_error(run("generate", "--model", "emoji"), "1051 classes", example)


@pytest.mark.parametrize("name", BUNDLED)
def test_names_of_bundled_models(name: str) -> None:
    assert model_source(name) == str(BUNDLED[name])
    assert model_source(None) == str(DIGITS)


def test_pictures_do_not_hide_a_bundled_model_and_a_pipeline_does() -> None:
    """`transdiff generate pizza --no-grid --output emoji` makes a folder of that name."""
    Path("emoji").mkdir()
    Path("emoji/pizza-0.png").touch()
    assert model_source("emoji") == str(EMOJI)
    Path("emoji/checkpoints/step-00000001/pipeline").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="training run that has not finished"):
        model_source("emoji")
    tiny_pipeline().save_pretrained("emoji/pipeline")
    assert model_source("emoji") == str(Path("emoji/pipeline"))


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_model_names_those_whose_works_it_learned_from(name: str) -> None:
    text = (BUNDLED[name] / ATTRIBUTION_NAME).read_text(encoding="utf-8")
    assert text == attribution(name) + "\n"
    assert all(work.author in text and work.licence in text for work in WORKS[name])
    card = model_card.all_cards(*BUNDLED.values())[f"{BUNDLED[name].name}.md"]
    assert text in card


def test_the_authors_go_along_with_a_copy_and_its_card(tmp_path: Path) -> None:
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    pipe.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / ATTRIBUTION_NAME).read_text(encoding="utf-8") == attribution("digits") + "\n"
    copied = TransDiffPipeline.from_pretrained(tmp_path / "copy")
    copied._write_card(tmp_path, "me/copy", include_code=False)
    assert attribution("digits") in (tmp_path / model_card.CARD_NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BUNDLED)
def test_no_bundled_file_names_a_place_of_the_machine_that_made_it(name: str) -> None:
    for file in BUNDLED[name].rglob("*.json"):
        assert '"/' not in file.read_text(encoding="utf-8"), file
        assert '"~' not in file.read_text(encoding="utf-8"), file
