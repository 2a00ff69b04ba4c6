"""Inheritance: what is copied, resized, fresh; anything else is an error."""

import pytest
import torch

from training.inherit import inherit, table
from transdiff_pipelines import ARConditionEncoder


def encoder(seed: int, **changes) -> ARConditionEncoder:
    torch.manual_seed(seed)
    sizes = {
        "num_classes": 3,
        "sample_size": 4,
        "in_channels": 2,
        "patch_size": 1,
        "num_class_tokens": 2,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
    }
    return ARConditionEncoder(**(sizes | changes))


def test_one_step_to_mrar() -> None:
    old, new, untouched = encoder(0), encoder(1, patch_size=2), encoder(1, patch_size=2)
    rows = {row.name: row.action for row in inherit(new, old.state_dict())}
    fresh = {"reference_projection.weight", "reference_projection.bias"}
    assert {name for name, action in rows.items() if action == "fresh"} == fresh
    assert {name for name, action in rows.items() if action == "resized"} == {"mask_token"}
    for name, value in new.state_dict().items():
        if name in fresh:
            assert torch.equal(value, untouched.state_dict()[name])
        elif name == "mask_token":
            assert value.shape == (1, 4, 8)
            assert all(torch.equal(value[:, index], old.mask_token[:, 0]) for index in range(4))
        else:
            assert torch.equal(value, old.state_dict()[name])


def test_the_same_sizes_are_copied_whole() -> None:
    old, new = encoder(0), encoder(1)
    assert {row.action for row in inherit(new, old.state_dict())} == {"copied"}
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())


def test_the_model_inherited_from_is_not_shared() -> None:
    old, new = encoder(0), encoder(1, patch_size=2)
    inherit(new, old.state_dict())
    with torch.no_grad():
        new.mask_token.zero_()
    assert old.mask_token.abs().sum() > 0


def test_the_table_names_what_changed() -> None:
    text = table(inherit(encoder(1, patch_size=2), encoder(0).state_dict()))
    assert "resized  mask_token                   (1, 1, 8) -> (1, 4, 8)" in text
    assert "fresh    reference_projection.weight  (8, 2) -> (8, 8)" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 2}, "the old one lacks .*transformer_blocks.1"),
        ({"attention_head_dim": 8}, "of the same width"),
        ({"num_class_tokens": 3}, "position_embedding has shape"),
    ],
)
def test_any_other_difference_is_an_error(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inherit(encoder(1, **changes), encoder(0).state_dict())


def test_a_longer_source_is_an_error_too() -> None:
    with pytest.raises(ValueError, match=r"no place for \['transformer_blocks.1"):
        inherit(encoder(1), encoder(0, num_layers=2).state_dict())
