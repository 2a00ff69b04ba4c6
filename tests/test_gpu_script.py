"""`make gpu` without a GPU: rehearsed whole on the CPU, and its parts left out, cut off, failing and stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.common import parts
from benchmarks.common.parts import Deadline, Part, Skip, run_part
from benchmarks.on_gpu.common import Shared
from benchmarks.on_gpu.parts import PARTS


ROOT = Path(__file__).parents[1]
REHEARSAL = ["--device", "cpu", "--tiny", "--minutes", "30"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *REHEARSAL, *map(str, arguments)]


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    done = subprocess.run(command("--output", tmp_path / "gpu"), cwd=ROOT, capture_output=True, text=True)
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert done.returncode == 0, (done.stdout, done.stderr)
    statuses = {name: outcome["status"] for name, outcome in result["parts"].items()}
    assert list(statuses) == [part.name for part in PARTS if part.rehearsed]
    assert {name for name, status in statuses.items() if status != "done"} == {"emoji"}
    found = {name: outcome["result"] for name, outcome in result["parts"].items() if outcome["status"] == "done"}
    assert found["parity"]["reproduced"]
    assert [row["peer"] for row in found["sampling_l"]["settings"][0]["rows"]] == [
        "transdiff_pipelines", "transdiff_pipelines, compiled: on",
    ]  # fmt: skip
    assert [row["full_steps"] for row in found["flow_map"]["settings"][0]["rows"]] == [100, 4, 1]
    assert [row["name"] for row in found["training_b"]["rows"]] == ["ours", "ours, compiled"]
    for engine in ("no", "fsdp2"):
        assert 0 < found["sharding"]["engines"][engine]["outside_fraction"] < 1
    assert found["memory"]["ways"]["layerwise casting to float8"]["error"] > 0
    assert found["memory"]["ways"]["model offload"] == {"reason": "it needs a device beside the CPU"}
    assert "A rehearsal with tiny models: no number here means anything" in (tmp_path / "gpu.md").read_text()
    assert all((tmp_path / name).stat().st_size > 0 for name in ("gpu.png", "gpu_training.png"))
    assert not list(tmp_path.glob(".*"))


def test_a_short_rehearsal(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--parts", "sampling_l_graphs", "emoji", "--output", tmp_path / "gpu"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    outcomes = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    rows = outcomes["sampling_l_graphs"]["result"]["settings"][0]["rows"]
    assert [row["compiled"] for row in rows] == ["off", "reduce-overhead"]
    assert outcomes["emoji"]["status"] == "skipped"
    assert (tmp_path / "gpu.png").stat().st_size > 0


def part(measure, name: str = "one", seconds: float = 0.0) -> Part:
    return Part(name, "A question?", seconds, measure, lambda result: f"{result}")


def shared(minutes: float = 1.0) -> Shared:
    return Shared(torch.device("cpu"), True, None, Deadline(minutes))


def outcome(measure, minutes: float = 1.0, estimate: float = 0.0) -> dict:
    return run_part(part(measure), None, Deadline(minutes), estimate)


class TestParts:
    def test_done(self):
        assert outcome(lambda _: {"x": 1})["status"] == "done"
        assert outcome(lambda _: {"x": 1})["result"] == {"x": 1}

    def test_left_out_where_it_does_not_fit(self):
        found = outcome(lambda _: pytest.fail("measured"), minutes=1.0, estimate=90)
        assert found["status"] == "skipped"
        assert found["reason"].startswith("it takes about 90 s, and ")

    def test_left_out_where_something_is_missing(self):
        def measure(_):
            raise Skip("no checkout")

        assert {key: outcome(measure)[key] for key in ("status", "reason")} == {
            "status": "skipped",
            "reason": "no checkout",
        }

    def test_cut_off_when_the_time_is_up_also_where_errors_are_swallowed(self):
        def measure(_):
            while True:
                try:
                    time.sleep(10)
                except Exception:
                    pytest.fail("caught as an error")

        assert outcome(measure, minutes=0.005)["status"] == "cut off"

    def test_a_failure_keeps_its_reason_and_the_clock_is_off_again(self):
        found = outcome(lambda _: 1 / 0)
        assert (found["status"], found["reason"]) == ("failed", "ZeroDivisionError: division by zero")
        assert "Traceback" in found["traceback"]
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def test_one_way_of_several(self):
        assert parts.attempt(lambda: {"x": 1}) == {"x": 1}
        assert parts.attempt(lambda: 1 / 0) == {"reason": "ZeroDivisionError: division by zero"}


def begin(tmp_path: Path) -> tuple[dict, Path]:
    machine = {"date": "2026-01-01", "processor": "p", "cores": 1, "torch": "t", "diffusers": "d", "python": "3"}
    return {"command": "c", "machine": machine, "rehearsal": True, "parts": {}}, tmp_path / "gpu"


class TestRun:
    def test_a_failing_part_does_not_end_the_run(self, tmp_path, capsys):
        result, output = begin(tmp_path)
        assert gpu.run([part(lambda _: 1 / 0), part(lambda _: {}, "two")], shared(), result, output)
        saved = json.loads(output.with_suffix(".json").read_text())["parts"]
        assert [outcome["status"] for outcome in saved.values()] == ["failed", "done"]
        assert re.match(r"one: failed, \d+ s: ZeroDivisionError: division by zero\n", capsys.readouterr().out)

    def test_what_is_finished_is_kept_when_the_run_is_stopped(self, tmp_path, capsys):
        result, output = begin(tmp_path)
        before = signal.getsignal(signal.SIGTERM)

        def stop(_):
            # what the first part has found is on the disk before the second one begins
            assert list(json.loads(output.with_suffix(".json").read_text())["parts"]) == ["one"]
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        three = part(lambda _: pytest.fail("run after the end"), "three")
        assert not gpu.run([part(lambda _: {"x": 1}), part(stop, "two"), three], shared(), result, output)
        saved = json.loads(output.with_suffix(".json").read_text())["parts"]
        assert {name: outcome["status"] for name, outcome in saved.items()} == {"one": "done", "two": "cut off"}
        assert "two: stopped" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGTERM) is before

    def test_an_earlier_run_is_gone_on_with(self, tmp_path):
        result, output = begin(tmp_path)
        gpu.run([part(lambda _: {"x": 1}), part(lambda _: 1 / 0, "two")], shared(), result, output)
        assert list(gpu.earlier_parts(output.with_suffix(".json"))) == ["one"]
        assert gpu.earlier_parts(None) == {}


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _leave_this_process_alone(self, monkeypatch):
        """The command sets up a process of its own; here other tests follow, of torch.compile and of messages."""
        monkeypatch.setattr("benchmarks.on_gpu.common.be_quiet", lambda: None)
        monkeypatch.setattr("benchmarks.on_gpu.correctness.exact_float32", lambda: None)
        monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)

    def refused(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            gpu.main(list(arguments))
        return str(end.value)

    def test_what_cannot_be_done_is_said_first(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device; rehearse with --device cpu --tiny" in self.refused()
        assert "add --tiny" in self.refused("--device", "cpu")
        assert "no part abacus; there are parity, " in self.refused(*REHEARSAL, "--parts", "abacus")
        assert "has no models/transdiff_mrar.py" in self.refused(*REHEARSAL, "--reference", str(tmp_path))
        assert "is no result of this command" in self.refused(*REHEARSAL, "--earlier", str(tmp_path / "no.json"))
        monkeypatch.setattr(gpu, "NEEDED", ("torch", "abacus"))
        assert "not installed: abacus." in self.refused(*REHEARSAL)

    def test_parts_are_listed_in_order_of_worth(self, capsys):
        gpu.main(["--list"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [part.name for part in PARTS]

    def test_parts_that_do_not_fit_are_left_out(self, tmp_path):
        with pytest.raises(SystemExit) as end:
            gpu.main([*REHEARSAL, "--minutes", "0", "--output", str(tmp_path / "gpu")])
        assert end.value.code == 0
        saved = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert {outcome["status"] for outcome in saved.values()} == {"skipped"}
