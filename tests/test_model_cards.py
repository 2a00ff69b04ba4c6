"""The cards in model_cards/ are what the command writes today, and what the Hub can read."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_pipeline

from training.digits import quality
from training.emoji import judge
from transdiff_pipelines import DIGITS, model_card, write_cards
from transdiff_pipelines.data import imagenet_id2label
from transdiff_pipelines.loaders import save_converted
from transdiff_pipelines.presets import PUBLISHED


FOLDER = Path(__file__).parent.parent / "model_cards"
QUALITY = {
    "split": "test",
    "num_images": 1000,
    "settings": {},
    "real": {"recognition": 0.99, "nearest": 10.0, "copies": 0.01, "variance": 300.0, "frechet": 1.5},
    "mean": {"recognition": 0.95, "nearest": 11.0, "copies": 0.02, "variance": 280.0, "frechet": 3.25},
    "spread": dict.fromkeys(("recognition", "nearest", "copies", "variance", "frechet"), 0.0),
    "runs": [{"seed": 0}, {"seed": 1}],
}


def read(name: str) -> ModelCard:
    return ModelCard((FOLDER / f"{name}.md").read_text(encoding="utf-8"))


def test_the_cards_are_current() -> None:
    write_cards.main(["--output", str(FOLDER), "--check"])


def test_the_check_names_what_is_not_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cards.main(["--output", str(tmp_path)])
    write_cards.main(["--output", str(tmp_path), "--check"])
    (tmp_path / "transdiff_b.md").write_text("changed", encoding="utf-8")
    (tmp_path / "transdiff_h.md").unlink()
    (tmp_path / "another.md").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit):
        write_cards.main(["--output", str(tmp_path), "--check"])
    assert "another.md, transdiff_b.md, transdiff_h.md" in capsys.readouterr().err


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_card_tells_the_published_numbers_and_whose_they_are(model) -> None:
    card = read(model.folder)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "diffusers", model_card.TASK)
    assert data.base_model == "zhendch/Transdiff"
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    expected = {
        "fid": model.fid,
        "inception_score": model.inception_score,
        "precision": model.precision,
        "recall": model.recall,
    }
    assert values == {name: value for name, value in expected.items() if value is not None}
    for result in data.eval_results:
        assert result.verified is False
        assert "unverified" in result.metric_name
        assert "paper" in result.source_name
        assert result.source_url == "https://arxiv.org/abs/2506.09482"
    for setting in ("guidance_scale", "drift_scale", "diffusion_scale"):
        assert f"| `{setting}` | {getattr(model, setting)} |" in card.text
    assert f"--model {model.folder} " in card.text


@pytest.mark.parametrize("name", [*PUBLISHED, "digits", "digits_flow_map", "emoji"])
def test_a_card_has_every_section_and_code_that_parses(name: str) -> None:
    text = read(name).text
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert {"Usage", "Limits", "Citation"} <= set(sections)
    assert "arxiv.org/abs/2506.09482" in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, name, "exec")
    for label in re.findall(r'pipe\("(.*?)"\)', text) if name in PUBLISHED else []:
        assert any(label in names.split(", ") for names in imagenet_id2label().values())


def test_the_digits_card_takes_settings_and_results_from_the_models_folder(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    assert "## Results" not in model_card.digits_card(tmp_path)
    (tmp_path / model_card.QUALITY_NAME).write_text(json.dumps(QUALITY), encoding="utf-8")
    card = ModelCard(model_card.digits_card(tmp_path))
    assert "| `guidance_scale` | 1.3 |" in card.text
    assert "| recognised as the digit asked for, % | 99.00 | 95.00 ± 0.00 |" in card.text
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["accuracy"] == 95.0
    assert values["frechet_distance"] == 3.25


def test_the_digits_card_knows_every_measure_that_is_taken() -> None:
    assert model_card.DIGITS_MEASURES.keys() == quality.MEASURES.keys()


def test_the_emoji_card_names_the_artists_and_takes_results_from_the_models_folder(tmp_path: Path) -> None:
    tiny_pipeline(id2label=dict(enumerate(["ant", "bat", "cat face", "dog face", "eye"]))).save_pretrained(tmp_path)
    text = model_card.emoji_card(tmp_path)
    assert "## Results" not in text
    assert 'from_pretrained(EMOJI)\nimage = pipe("dog face")' in text
    assert ModelCard(text).data.license == "cc-by-4.0"
    for author in ("Google", "Twitter", "JoyPixels", "Microsoft"):
        assert re.search(rf"\| \[.*{author}.* \| (Apache-2.0|CC BY 4.0|MIT) \|", text), author
    values = dict.fromkeys(model_card.EMOJI_MEASURES, 0.25)
    result = QUALITY | {"real": values, "mean": values, "spread": dict.fromkeys(values, 0.0)}
    (tmp_path / model_card.QUALITY_NAME).write_text(json.dumps(result), encoding="utf-8")
    card = ModelCard(model_card.emoji_card(tmp_path))
    assert "| recognised as the class asked for, % | 25.00 | 25.00 ± 0.00 |" in card.text
    assert "`training.emoji.quality` on 1,000 images for each of 2 seeds" in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "frechet_distance"}
    assert model_card.all_cards(DIGITS, emoji=tmp_path)["emoji.md"] == model_card.emoji_card(tmp_path)
    assert "emoji.md" not in model_card.all_cards(DIGITS, emoji=tmp_path / "none")


def test_the_emoji_card_knows_measures_that_are_taken() -> None:
    assert model_card.EMOJI_MEASURES.keys() <= judge.MEASURES.keys()


def test_the_digits_card_has_results_once_they_are_measured() -> None:
    measured = (DIGITS / model_card.QUALITY_NAME).is_file()
    assert ("## Results" in read("digits").text) == measured


def test_the_card_of_a_trained_model_tells_how_it_was_trained() -> None:
    metrics = [{"step": step, "loss": 1 / step, "loss_image_0": 2 / step, "grad_norm": 1.0} for step in range(1, 101)]
    config = {"output": "outputs/mine", "optimizer": {"learning_rate": 0.001}}
    text = model_card.training_card(
        tiny_pipeline(), "mine", config, "Trained on 12 images.", metrics, {"Samples": "samples.png"}
    )
    card = ModelCard(text)
    assert card.data.pipeline_tag == model_card.TASK
    assert card.data.license is None
    assert "Trained on 12 images." in card.text
    assert "![Samples](samples.png)" in card.text
    assert "optimizer:\n  learning_rate: 0.001" in card.text
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \|$", card.text, re.MULTILINE)
    assert len(rows) == 10
    assert rows[-1] == ("100", "0.0100", "0.0200")


def test_an_uploaded_pipelines_card_claims_nothing_it_does_not_know() -> None:
    card = ModelCard(model_card.pipeline_card(tiny_pipeline(id2label=None), "me/mine"))
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "pipe(0)" in card.text
    assert 'from_pretrained("me/mine")' in card.text


def test_a_converted_checkpoint_of_known_origin_has_its_card(tmp_path: Path) -> None:
    save_converted(tiny_pipeline(), tmp_path / "known", card=PUBLISHED["transdiff_l"])
    card = (tmp_path / "known/README.md").read_text(encoding="utf-8")
    assert card == (FOLDER / "transdiff_l.md").read_text(encoding="utf-8")
    save_converted(tiny_pipeline(), tmp_path / "unknown")
    assert not (tmp_path / "unknown/README.md").exists()
