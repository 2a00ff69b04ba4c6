"""Inheritance: what is copied, resized, fresh; anything else is an error."""

import pytest
import torch
from tiny import tiny_transformer

from training.model.inherit import DECODER_RULES, inherit, interpolate_positions, table
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


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_one_step_to_mrar(patch_size: int) -> None:
    grids = {"sample_size": 16}
    old, new, untouched = encoder(0, **grids), *(encoder(1, patch_size=patch_size, **grids) for _ in range(2))
    rows = {row.name: row.action for row in inherit(new, old.state_dict())}
    fresh = {"reference_projection.weight", "reference_projection.bias"}
    assert {name for name, action in rows.items() if action == "fresh"} == fresh
    assert {name for name, action in rows.items() if action == "resized"} == {"mask_token"}
    for name, value in new.state_dict().items():
        if name in fresh:
            assert torch.equal(value, untouched.state_dict()[name])
        elif name == "mask_token":
            assert value.shape == (1, 256 // patch_size**2, 8)
            assert all(torch.equal(value[:, index], old.mask_token[:, 0]) for index in range(value.shape[1]))
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


def test_positions_grow_with_the_grid_and_stay_where_they_are() -> None:
    """Pixel centres keep their place (corners are not aligned): a plane stays the same plane, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([rows, columns, torch.ones(8, 8)], dim=-1).view(1, 64, 3)
    grown = interpolate_positions(plane, torch.empty(1, 256, 3)).view(16, 16, 3)
    inner = slice(4, 12)
    places = (torch.arange(16.0) + 0.5) / 2 - 0.5
    near = {"atol": 0.05, "rtol": 0}  # PyTorch's cubic is off a straight line by that much; aligned corners by 0.4
    torch.testing.assert_close(grown[inner, inner, 0], places[inner, None].expand(8, 8), **near)
    torch.testing.assert_close(grown[inner, inner, 1], places[None, inner].expand(8, 8), **near)
    torch.testing.assert_close(grown[..., 2], torch.ones(16, 16))


def test_a_decoder_for_more_tokens_keeps_everything_but_positions() -> None:
    old, new = tiny_transformer(4), tiny_transformer(8)
    rows = inherit(new, old.state_dict(), DECODER_RULES)
    assert [row.name for row in rows if row.action != "copied"] == ["position_embedding"]
    with pytest.raises(ValueError, match="not the width"):
        inherit(tiny_transformer(8, attention_head_dim=4), old.state_dict(), DECODER_RULES)


def test_a_longer_source_is_an_error_too() -> None:
    with pytest.raises(ValueError, match=r"no place for \['transformer_blocks.1"):
        inherit(encoder(1), encoder(0, num_layers=2).state_dict())
