"""Half precision that a processor is slow at is told of, once and before the work; the decision, and who says it."""

import math
from pathlib import Path

import pytest
import torch
from command import run
from tiny import tiny_pipeline

from transdiff_pipelines import half_precision
from transdiff_pipelines.half_precision import half_precision_note, slowdown


CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """A processor whose matrix products take `ratio` times as long in half precision as in float32."""
    monkeypatch.setattr(half_precision, "_product_seconds", lambda dtype: 1e-3 * (1 if dtype.itemsize == 4 else ratio))


@pytest.mark.parametrize(("ratio", "told"), [(0.3, False), (1.0, False), (1.4, False), (1.6, True), (40.0, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decision(monkeypatch, dtype, ratio, told) -> None:
    pretend(monkeypatch, ratio)
    note = half_precision_note(dtype, CPU)
    assert (note is not None) == told
    if note is not None:
        assert str(dtype).removeprefix("torch.") in note
        assert f"{ratio:.1f} times as long as those of float32" in note


def test_nothing_is_measured_where_nothing_can_be_said(monkeypatch) -> None:
    monkeypatch.setattr(half_precision, "_product_seconds", lambda dtype: pytest.fail("measured"))
    assert half_precision_note(torch.float32, CPU) is None
    assert half_precision_note(torch.bfloat16, torch.device("cuda")) is None
    assert half_precision_note(torch.float16, torch.device("mps")) is None


def test_an_interruption_of_a_product_does_not_count(monkeypatch) -> None:
    seconds = {torch.bfloat16: [9.0, 2.0, 7.0], torch.float32: [5.0, 1.0, 1.0]}
    monkeypatch.setattr(half_precision, "_ROUNDS", 2)
    monkeypatch.setattr(half_precision, "_product_seconds", lambda dtype: seconds[dtype].pop(0))
    assert slowdown(torch.bfloat16) == 2.0


def test_the_measurement_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    assert 0 < slowdown(torch.bfloat16) < math.inf
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dtype", "ratio", "times"), [("float16", 30.0, 1), ("bfloat16", 1.0, 0), ("float32", 30, 0)])
def test_generate_says_it_once(monkeypatch, tmp_path: Path, dtype: str, ratio: float, times: int) -> None:
    pretend(monkeypatch, ratio)
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    result = run("generate", 3, "--model", tmp_path / "pipe", "--steps", 2, "--device", "cpu", "--dtype", dtype,
                 "--output", tmp_path / "out.png", "-n", 2, "--batch-size", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr.count("slow on this processor") == times
    assert result.stderr.count("30.0 times as long as those of float32: --dtype float32") == times
