"""The comparison that other tests rely on, and the rounding of other processors."""

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_close, vary_rounding


def test_close_is_within_roundings_of_the_largest_value():
    expected = torch.tensor([1e-9, 100.0])
    eps = torch.finfo(torch.float32).eps
    assert_close(expected + 900 * eps, expected, roundings=10)
    with pytest.raises(AssertionError):
        assert_close(expected + 1100 * eps, expected, roundings=10)


def test_varied_rounding_is_one_for_equal_shapes_and_another_for_others(monkeypatch):
    exact = F.linear
    for name in ("linear", "conv2d", "scaled_dot_product_attention", "layer_norm", "group_norm"):
        monkeypatch.setattr(F, name, getattr(F, name))  # so that all are as before afterwards
    vary_rounding(8)
    layer, rows = torch.nn.Linear(16, 16), torch.randn(5, 16)
    whole, part = layer(rows), layer(rows[:3])
    assert torch.equal(layer(rows), whole)
    assert not torch.equal(part, whole[:3])
    assert_close(part, whole[:3], roundings=32)
    assert_close(whole, exact(rows, layer.weight, layer.bias), roundings=32)
