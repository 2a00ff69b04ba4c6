"""The planning table: what is measured, what is computed from it."""

import pytest

from training import plan
from training.distributed.zero2 import BUCKET
from training.dry_run import state_per_process
from training.plan import Measured, Plan
from training.settings.config import ConfigError


def test_the_table_measures_one_process_and_extrapolates_to_more(make_config) -> None:
    config = make_config(**{"model.patch_size": 2, "optimizer.gradient_accumulation": 3})
    text = plan.plan(config, batch_sizes=[1, 2], processes=[1, 4], steps=1)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    kinds = [("1", "no", "measured"), *(("4", kind, "extrapolated") for kind in ("no", "zero2", "fsdp2"))]
    assert [(row[0], row[1], row[-1]) for row in rows] == kinds * 2
    assert [row[2] for row in rows] == ["1"] * 4 + ["2"] * 4
    images = 4 * (4 * 3) * 4  # steps, groups of a step, images of a group
    for row in rows:
        assert float(row[3]) * float(row[5]) * 3600 == pytest.approx(images, rel=0.02)
    assert float(rows[1][3]) == pytest.approx(4 * float(rows[0][3]), rel=0.02)


def test_split_weights_need_less_memory() -> None:
    known = Plan({"weights": 100, "gradients": 80, "optimiser": 160, "EMA": 80}, blocks=7, images=1)
    measured = Measured(batch_size=1, images_per_second=1.0, working=80 + 50)
    assert known.memory(measured, 1, "no") == 100 + 160 + 80 + 130
    assert known.memory(measured, 4, "no") == 100 + 160 + 80 + 130
    assert known.memory(measured, 4, "zero2") == 100 + 80 + (80 + 160 + 80) // 4 + 50 + (4 * BUCKET + 80)
    assert state_per_process(known.state, "zero2", 1) == state_per_process(known.state, "no", 4) == known.state
    assert known.memory(measured, 4, "fsdp2") == (100 + 80 + 160 + 80) // 4 + 50 + 7


def test_a_batch_that_does_not_fit_is_a_row_too(make_config, monkeypatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda *_: None)
    assert "| 1 | no | 7 | | out of memory | | measured |" in plan.plan(make_config(), [7], [8])


def test_mistakes_are_one_line(make_config, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        plan.main([f"--config={tmp_path / 'missing.yaml'}", "--batch-sizes", "1"])
    assert capsys.readouterr().err.startswith("training.plan: no config file")
    with pytest.raises(ConfigError, match="it must be 1 or more"):
        make_config(**{"data.batch_size": 0})
