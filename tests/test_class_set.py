"""Another class set for a pipeline: names keep their embedding, new ones start from the mean, the null class stays."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffInpaintPipeline, TransDiffPipeline
from transdiff_pipelines.pipelines.class_set import match_classes


OLD = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane, bird", 3: "crane, machine", 4: "zebra"}
NEW = {0: "zebra", 1: "okapi", 2: "Tinca tinca"}


def latents(pipe: TransDiffPipeline, label: str | int, **kwargs) -> torch.Tensor:
    options = {"num_inference_steps": 2, "generator": seeded(), "output_type": "latent"}
    return pipe([label], **(options | kwargs)).images


def test_a_class_kept_by_name_makes_the_images_it_made() -> None:
    pipe = tiny_pipeline()
    before = {name: latents(pipe, name) for name in ("zebra", "tench")}
    assert pipe.resize_class_embeddings(NEW) == [1]
    assert torch.equal(latents(pipe, 0), before["zebra"])  # guided: the null class was kept too
    assert torch.equal(latents(pipe, 2), before["tench"])


def test_a_new_class_starts_from_the_mean_and_the_rows_are_copies() -> None:
    pipe = tiny_pipeline()
    old = pipe.condition_encoder.class_embedding.weight.detach().clone()
    pipe.resize_class_embeddings(NEW)
    encoder = pipe.condition_encoder
    expected = torch.stack([old[4], old[:5].mean(0), old[0], old[5]])
    torch.testing.assert_close(encoder.class_embedding.weight.detach(), expected)
    assert (encoder.config.num_classes, encoder.null_class) == (3, 3)
    assert encoder.class_embedding.weight.requires_grad
    assert pipe.labels == {"zebra": 0, "okapi": 1, "Tinca tinca": 2}
    with pytest.raises(ValueError, match="outside 0..2"):
        pipe(3)
    with pytest.raises(ValueError, match="'goldfish' is unknown"):
        pipe("goldfish")


def test_the_new_class_set_is_saved(tmp_path) -> None:
    pipe = tiny_pipeline()
    pipe.resize_class_embeddings(NEW)
    pipe.save_pretrained(tmp_path)
    loaded = TransDiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipe.labels
    assert torch.equal(latents(loaded, "okapi"), latents(pipe, "okapi"))


def test_more_classes_than_before() -> None:
    pipe = tiny_pipeline()
    assert pipe.resize_class_embeddings(OLD | {5: "okapi", 6: "gnu"}) == [5, 6]
    assert latents(pipe, 6).isfinite().all()


def test_without_names_a_class_is_its_id() -> None:
    pipe = tiny_pipeline(id2label=None)
    before = latents(pipe, 1)
    assert pipe.resize_class_embeddings(dict(enumerate("abcdef"))) == [5]
    assert torch.equal(latents(pipe, "b"), before)


def test_what_names_match() -> None:
    assert match_classes(OLD, {0: "crane, machine", 1: "goldfish, Carassius", 2: "Crane"}, 5) == [3, 1, None]


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({0: "crane"}, r"'crane' means several classes of the model, \[2, 3\]"),
        ({1: "zebra", 2: "okapi"}, "expected 0..1"),
        ({}, "expected 0..0"),
    ],
)
def test_what_cannot_be_matched_changes_nothing(new: dict[int, str], words: str) -> None:
    pipe = tiny_pipeline()
    before = latents(pipe, "zebra")
    with pytest.raises(ValueError, match=words):
        pipe.resize_class_embeddings(new)
    assert torch.equal(latents(pipe, "zebra"), before)


def sharing(pipe: TransDiffPipeline, how: str) -> TransDiffPipeline:
    """Another pipeline with the same encoder."""
    other = {
        "from_pipe": lambda: TransDiffPipeline.from_pipe(pipe),
        "components": lambda: TransDiffPipeline(**pipe.components),
        "img2img": lambda: TransDiffImg2ImgPipeline.from_pipe(pipe),
        "inpaint of img2img": lambda: TransDiffInpaintPipeline(**TransDiffImg2ImgPipeline.from_pipe(pipe).components),
    }[how]()
    other.set_progress_bar_config(disable=True)
    return other


WAYS_TO_SHARE = ["from_pipe", "components", "img2img", "inpaint of img2img"]


@pytest.mark.parametrize("how", WAYS_TO_SHARE)
def test_names_and_guidance_go_along(how: str) -> None:
    pipe = tiny_pipeline(num_inference_steps=7)
    other = sharing(pipe, how)
    assert other.config.id2label == OLD
    assert other.labels == pipe.labels
    assert (other.config.guidance_scale, other.config.num_inference_steps) == (1.3, 7)


@pytest.mark.parametrize("how", WAYS_TO_SHARE)
@pytest.mark.parametrize("new", [NEW, dict(enumerate("abcde"))], ids=["fewer", "as many"])
def test_a_class_set_that_changes_under_a_shared_encoder(how: str, new: dict[int, str], tmp_path) -> None:
    pipe = tiny_pipeline()
    other = sharing(pipe, how)
    pipe.resize_class_embeddings(new)
    assert other.get_label_ids(new[0]) == [0]
    with pytest.raises(ValueError, match="'goldfish' is unknown"):
        other.get_label_ids("goldfish")
    assert other.labels == pipe.labels
    other.save_pretrained(tmp_path)
    assert TransDiffPipeline.from_pretrained(tmp_path).config.id2label == new
    assert sharing(other, how).config.id2label == new
    other.resize_class_embeddings(OLD)  # and the other way round
    assert pipe.labels == tiny_pipeline().labels


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_has_classes_of_its_own(copied) -> None:
    pipe = tiny_pipeline()
    other = copied(pipe)
    pipe.resize_class_embeddings(NEW)
    assert other.config.id2label == OLD
    assert latents(other, "goldfish").isfinite().all()
    other.resize_class_embeddings(["a", "b"])
    assert (pipe.config.id2label, other.config.id2label) == (NEW, {0: "a", 1: "b"})


def test_names_of_ones_own_rename_no_other_pipeline() -> None:
    pipe = tiny_pipeline()
    renamed = TransDiffPipeline.from_pipe(pipe, id2label=list("abcde"))
    assert renamed.get_label_ids("b") == [1]
    assert pipe.get_label_ids("goldfish") == [1]
    assert TransDiffPipeline(**renamed.components).get_label_ids("b") == [1]


def test_an_encoder_in_the_place_of_another(tmp_path) -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    other.resize_class_embeddings(NEW)
    pipe.condition_encoder = other.condition_encoder
    assert pipe.config.id2label == NEW  # its names came with it
    other.condition_encoder.save_pretrained(tmp_path / "encoder")
    pipe = tiny_pipeline()
    pipe.condition_encoder = type(pipe.condition_encoder).from_pretrained(tmp_path / "encoder")
    for use in (
        lambda: pipe("goldfish"),
        lambda: pipe(0),
        lambda: pipe.labels,
        lambda: pipe.save_pretrained(tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match=r"id2label names 5 classes, but the condition encoder has 3"):
            use()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("id2label", "error", "message"),
    [
        ({**OLD, 5: "okapi"}, ValueError, "names 6 classes, but the condition encoder has 5, 0..4: it has none for 5"),
        ({0: "a", 1: "b"}, ValueError, "names 2 classes, .* there is no name for 2"),
        (["a", "b"], ValueError, "there is no name for 2"),
        ({}, ValueError, "names 0 classes"),
        ({index + 1: name for index, name in OLD.items()}, ValueError, "it has none for 5"),
        (dict.fromkeys(range(5), 3), TypeError, "names class 0 3, a int; expected a str"),
        ([3, 1, 2, 0, 4], TypeError, "names class 0 3, a int"),
        ({"a": 0}, TypeError, "the id 'a'; expected a whole number"),
        ({0.5: "a"}, TypeError, "the id 0.5"),
        ({**OLD, "0": "again"}, ValueError, "the id 0 twice"),
        ("abcde", TypeError, "id2label is a str"),
        (5, TypeError, "id2label is a int"),
    ],
)
def test_names_that_are_none_of_the_encoders(id2label, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message):
        tiny_pipeline(id2label=id2label)
    pipe = tiny_pipeline()
    with pytest.raises(error, match=message):
        TransDiffPipeline.from_pipe(pipe, id2label=id2label)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        TransDiffPipeline.from_pretrained(tmp_path, id2label=id2label)
    index = json.loads((tmp_path / "model_index.json").read_text())
    if isinstance(id2label, dict) and error is ValueError and "twice" not in message:
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": id2label}))
        with pytest.raises(error, match=message):
            TransDiffPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("id2label", [list("abcde"), tuple("abcde"), {str(i): name for i, name in enumerate("abcde")}])
def test_forms_of_names(id2label, tmp_path) -> None:
    pipe = tiny_pipeline(id2label=id2label)
    assert pipe.config.id2label == dict(enumerate("abcde"))
    pipe.save_pretrained(tmp_path)
    assert TransDiffPipeline.from_pretrained(tmp_path).get_label_ids("e") == [4]
    pipe.resize_class_embeddings(list("ec"))
    assert pipe.get_label_ids("e") == [0]


def test_an_embedding_with_an_adapter_is_not_replaced() -> None:
    pipe = tiny_pipeline()
    pipe.condition_encoder.add_adapter(LoraConfig(r=2, target_modules=["class_embedding"]))
    with pytest.raises(ValueError, match="the class embedding has a LoRA adapter"):
        pipe.resize_class_embeddings(NEW)
    assert pipe.config.id2label == OLD


def test_an_encoder_brings_its_own_names() -> None:
    """As many classes as the other pipeline's encoder has, so that the other's names would fit."""
    donor = tiny_pipeline(guidance_scale=2.0)
    donor.resize_class_embeddings(["a", "b", "c", "d", "e"])
    pipe = TransDiffPipeline.from_pipe(tiny_pipeline(), condition_encoder=donor.condition_encoder)
    assert pipe.labels == donor.labels == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert pipe.config.guidance_scale == 2.0


@pytest.mark.parametrize("label", [1, [1], None])
def test_a_class_name_is_a_str(label) -> None:
    with pytest.raises(TypeError, match="class name .* expected a str"):
        tiny_pipeline().get_label_ids(label)
