"""Another class set for a pipeline: names keep their embedding, new ones start from the mean, the null class stays."""

import pytest
import torch
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import TransDiffPipeline
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
