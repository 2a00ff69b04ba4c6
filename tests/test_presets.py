"""The table of published models describes models that exist, and ImageNet's names are ImageNet's."""

import pytest
import torch

from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel
from transdiff_pipelines.data import imagenet_id2label
from transdiff_pipelines.presets import PUBLISHED, SIZES, PublishedModel, published_model, size_of_width


def count_parameters(model: PublishedModel) -> int:
    with torch.device("meta"):
        parts = ARConditionEncoder(**model.encoder_config()), TransDiffTransformer2DModel(**model.transformer_config())
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_models_have_exactly_their_number_of_parameters(model: PublishedModel):
    assert count_parameters(model) == model.num_parameters


def test_every_size_is_published_in_one_step_and_with_references():
    kinds = {(model.size.name, model.num_images) for model in PUBLISHED.values()}
    assert kinds == {(size, images) for size in SIZES for images in (1, 4)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_heads_divide_the_width(size):
    assert size.num_attention_heads * size.attention_head_dim == size.width
    assert size_of_width(size.width) is size


def test_guidance_raises_the_inception_score_and_lowers_the_fid():
    for model in PUBLISHED.values():
        if model.fid_without_guidance is not None and model.inception_score_without_guidance is not None:
            assert model.fid < model.fid_without_guidance
            assert model.inception_score > model.inception_score_without_guidance


def test_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'transdiff_xl' is not a published model; .*transdiff_l_mrar"):
        published_model("transdiff_xl")


def test_imagenet_names():
    names = imagenet_id2label()
    assert list(names) == list(range(1000))
    assert all(part and part == part.strip() for name in names.values() for part in name.split(", "))
    assert names[1].split(", ")[0] == "goldfish"
    assert names[207] == "golden retriever"
    assert names[999].split(", ")[0] == "toilet tissue"
    assert [class_id for class_id, name in names.items() if "crane" in name.split(", ")] == [134, 517]
    assert [class_id for class_id, name in names.items() if "maillot" in name.split(", ")] == [638, 639]
