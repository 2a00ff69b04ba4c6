"""The benchmarks' own arithmetic, and each command once on tiny components. Nothing timed is asserted."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import seeded, tiny_pipeline

from benchmarks import few_steps, growth, precision, sampling, training
from benchmarks.common import machine, peers
from benchmarks.common.known_flows import (
    MEAN,
    STD,
    fitted_order,
    gaussian_errors,
    gaussian_velocity,
    model_calls,
    wasserstein_1,
)
from benchmarks.common.machine import CallClock, PeakMemory, matrix_product_rate
from benchmarks.common.operations import Operations, count_flops, limit_arithmetic
from benchmarks.common.peers import OurPipeline, Setting, recorded_step_noise
from benchmarks.common.reference import constructor_arguments, import_released
from benchmarks.common.report import markdown_table, significant
from benchmarks.common.samplers import EULER_MARUYAMA, FIXED_GRID, HEUN_ODE, SDE_1, SDE_2, time_grids
from transdiff_pipelines import FlowMatchEulerMaruyamaScheduler
from transdiff_pipelines.presets import SIZES, published_model


CPU = torch.device("cpu")


class Calls(torch.nn.Module):
    """A network that is called once a step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x @ self.weight
        return x


class TestMachine:
    def test_a_clock_splits_a_call_at_the_networks_entries(self, monkeypatch):
        network = Calls()
        clock = CallClock(CPU, network, num_images=2)
        # start; of two images the entries, with what follows each: 7, 7, 90 and 9, 13, 60; when a GPU would be done
        seconds = iter([0, 2, 9, 16, 106, 115, 128, 188, 188])
        monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
        assert clock.time(lambda: [network(torch.zeros(8)) for _ in range(6)][-1].sum()) == 0
        assert (clock.step, clock.total, clock.outside) == (9, 188, 188 - 6 * 9)
        assert not network._forward_pre_hooks

    @pytest.mark.parametrize(("seconds", "side"), [(0.02, 512), (0.3, 128)])
    def test_the_timed_product_grows_until_it_takes_long_enough(self, monkeypatch, seconds, side):
        clock = iter(range(100))
        monkeypatch.setattr(machine, "LARGEST_SIDE", {"cpu": 512})
        monkeypatch.setattr("time.perf_counter", lambda: seconds * next(clock))
        assert matrix_product_rate(CPU, torch.float32, repeats=2) == pytest.approx(2 * side**3 / seconds)

    def test_peak_memory_sees_what_is_freed_again(self):
        kept = torch.ones(1000)
        with PeakMemory(CPU) as peak:
            for _ in range(3):
                torch.ones(1 << 20)
            kept = kept + 1
        assert 1 << 22 <= peak.bytes < 1.1 * (1 << 22)


class TestOperations:
    def test_a_matrix_product_and_attention(self):
        left, right = torch.randn(3, 4), torch.randn(4, 5)
        assert count_flops(lambda: left @ right).get_total_flops() == 2 * 3 * 4 * 5
        query, key = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 9, 8)
        counter = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))
        assert counter.get_total_flops() == 2 * 2 * 2 * 7 * 9 * 8

    def test_counts_agree_with_the_arithmetic_of_the_limit(self):
        """A step of the transformer with and without projected condition, against the numbers printed."""
        size = replace(SIZES["B"], width=64, num_attention_heads=2, decoder_layers=3)
        model = replace(published_model("transdiff_b"), size=size)
        transformer = peers.TransDiffTransformer2DModel(**model.transformer_config()).eval()
        x, tokens = torch.randn(1, 16, 16, 16), torch.randn(1, 256, 64)
        with torch.no_grad():
            projected = transformer.project_condition(tokens)
            saved, cached, whole = (
                count_flops(call).get_total_flops()
                for call in (
                    lambda: transformer.project_condition(tokens),
                    lambda: transformer(x, 500.0, projected),
                    lambda: transformer(x, 500.0, tokens),
                )
            )
        assert whole - cached == saved
        # The printed numbers leave out what is not in the blocks: input, output and time, which are the same in both.
        ours, more = 3 * (14 * 64**2 + 1024 * 64), (3 * 2 + 1) * 64**2
        assert saved == 2 * 256 * more
        assert f"limit {(ours + more) / ours:.3f}" in limit_arithmetic(size)
        assert cached / (2 * 256 * ours) == pytest.approx(1, abs=0.05)

    def test_parts_of_a_call(self):
        encoder, network = torch.nn.Linear(8, 8), Calls()

        def sample(steps):
            x = encoder(torch.randn(4, 8))
            for _ in range(steps):
                x = network(x)

        operations = Operations.of(sample, network)
        assert (operations.before, operations.step) == (2 * 4 * 8 * 8, 2 * 4 * 8 * 3)
        assert operations.total(10) == operations.before + 10 * operations.step


class TestReport:
    def test_a_table_has_as_many_cells_as_columns(self):
        assert markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
        with pytest.raises(ValueError, match="has 1 cells; expected 2"):
            markdown_table(["a", "b"], [[1]])

    @pytest.mark.parametrize(("value", "text"), [(None, "—"), (0.12345, "0.123"), (1234.5, "1230"), (12.0, "12")])
    def test_numbers(self, value, text):
        assert significant(value) == text


class TestKnownFlows:
    def test_the_velocity_carries_the_path_of_a_gaussian(self):
        """x_σ = (1 - σ) x₀ + σ ε stays normal; its quantiles move with the velocity."""
        velocity, step = gaussian_velocity(), 1e-5
        quantile = torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64)

        def path(sigma):
            return (1 - sigma) * MEAN + quantile * math.hypot((1 - sigma) * STD, sigma)

        for sigma in (0.1, 0.5, 0.9):
            slope = (path(sigma + step) - path(sigma - step)) / (2 * step)
            torch.testing.assert_close(velocity(path(sigma), sigma), slope, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("sampler", "order"), [(EULER_MARUYAMA, 1), (SDE_1, 1), (SDE_2, 2), (HEUN_ODE, 2)])
    def test_samplers_show_their_order(self, sampler, order):
        config = FlowMatchEulerMaruyamaScheduler().config
        calls = [79, 159, 319]
        errors = [gaussian_errors(sampler.make(config), sampler.steps_within(n))[0] for n in calls]
        assert fitted_order(calls, errors) == pytest.approx(order, abs=0.25)

    def test_exact_error_equals_that_of_many_samples(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        exact = gaussian_errors(scheduler, 5)[1]
        generator = seeded()

        def draw():
            return torch.randn(400_000, 1, generator=generator, dtype=torch.float64)

        scheduler.set_timesteps(5)
        x = few_steps_samples(scheduler, draw)
        assert math.hypot(x.mean().item() - MEAN, x.std().item() - STD) == pytest.approx(exact, abs=4e-3)

    def test_wasserstein_distance_of_a_shift_is_the_shift(self):
        x = torch.randn(100, generator=seeded())
        assert wasserstein_1(x, x.flip(0) + 0.25) == pytest.approx(0.25)

    @pytest.mark.parametrize("sampler", FIXED_GRID, ids=lambda sampler: sampler.name)
    def test_no_sampler_makes_more_calls_than_it_is_given(self, sampler):
        config = FlowMatchEulerMaruyamaScheduler().config
        for calls in (5, 8, 20):
            made = model_calls(sampler.make(config), sampler.steps_within(calls))
            assert calls - sampler.calls_per_step < made <= calls

    def test_grids_reach_the_scheduler_and_differ(self):
        config = FlowMatchEulerMaruyamaScheduler(drift_scale=0.9).config
        made = [sampler.make(config) for sampler in time_grids()]
        assert len({(scheduler.config.shift, scheduler.config.sigma_last) for scheduler in made}) == len(made)
        assert {scheduler.config.drift_scale for scheduler in made} == {0.9}


def few_steps_samples(scheduler, draw):
    from benchmarks.common.known_flows import integrate

    return integrate(scheduler, gaussian_velocity(), draw(), draw)[1]


class TestFrechetRatio:
    def test_equal_sets_have_the_ratio_one_exactly(self):
        pixels, real = np.random.default_rng(0).normal(size=(2, 200, 5))
        assert few_steps.ratio_with_interval(pixels, pixels, real, replicates=20) == (1.0, 1.0, 1.0)

    def test_the_interval_holds_the_estimate_and_narrows_with_more_images(self):
        random = np.random.default_rng(0)
        widths = []
        for count in (200, 3200):
            real, near, far = random.normal(size=(3, count, 3)) + np.array([0.0, 0.5, 1.0])[:, None, None]
            ratio, low, high = few_steps.ratio_with_interval(far, near, real, replicates=100)
            assert low < ratio < high
            assert ratio == pytest.approx(4.0, rel=0.4)
            widths.append(math.log(high / low))
        assert widths[1] < 0.5 * widths[0]


class TestPeers:
    def test_recorded_noise_takes_the_place_of_drawn_noise(self):
        pipe = tiny_pipeline(2)
        side, steps = pipe.transformer.config.sample_size, 3
        noise = torch.randn(4 * (steps - 1), 1, 4, side, side, generator=seeded())
        arguments = {"num_inference_steps": steps, "latents": noise[0], "output_type": "latent"}
        draws = iter(noise)
        with recorded_step_noise(pipe, draws):
            first = pipe(0, **arguments).images
        assert next(draws, None) is None
        assert not torch.equal(pipe(0, **arguments).images, first)  # noise is drawn again
        with recorded_step_noise(pipe, iter(noise)):
            assert torch.equal(pipe(0, **arguments).images, first)

    def test_labels_differ(self):
        setting = Setting(published_model("transdiff_b"), 64, 1, torch.float32, "off", CPU)
        assert len(set(setting.labels)) == 64

    def test_a_folder_without_the_released_code_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="pass a checkout of the released code"):
            import_released(tmp_path)


class TestPrecision:
    def test_halves_err_a_little_and_float32_parts_are_float32(self):
        pipe = tiny_pipeline(1)
        noise = torch.randn(3, 1, 4, 4, 4, generator=seeded())
        run = precision.Run("tiny", pipe, noise[1:], class_labels=[1], num_inference_steps=3, latents=noise[0])
        expected = run.latents(torch.float32)
        assert torch.equal(run.latents(torch.float32), expected)
        everything = precision.KEPT["decoder"] + precision.KEPT["condition encoder"]
        assert torch.equal(run.latents(torch.bfloat16, everything), expected) is False  # weights were rounded
        for kept in precision.KEPT.values():
            assert 0 < precision.relative_error(run.latents(torch.bfloat16, kept), expected) < 0.1


@pytest.fixture
def tiny_models(monkeypatch):
    """The published 1-step and MRAR models of size B, made tiny."""
    size = replace(SIZES["B"], width=16, num_attention_heads=2, encoder_layers=1, decoder_layers=1)
    models = {
        name: replace(published_model(name), size=size, num_classes=3) for name in ("transdiff_b", "transdiff_b_mrar")
    }
    for module in (sampling, growth, training):
        monkeypatch.setattr(module, "published_model", models.__getitem__)
    monkeypatch.setattr(peers, "vae_of_published_size", lambda tiny=False: tiny_vae_of_16_channels())
    monkeypatch.setattr(machine, "LARGEST_SIDE", {"cpu": 64})
    return models


def tiny_vae_of_16_channels():
    from tiny import tiny_vae

    return tiny_vae(latent_channels=16)


class TestCommands:
    def test_sampling(self, tiny_models, tmp_path):
        sampling.main([
            "--models", *tiny_models, "--steps", "2", "--rounds", "2", "--decode", "--output", str(tmp_path / "run"),
        ])  # fmt: skip
        result = json.loads((tmp_path / "run.json").read_text())
        for setting, model in zip(result["settings"], tiny_models.values(), strict=True):
            row = setting["rows"][0]
            assert len(row["seconds"]) == 2
            assert row["full_steps"] == 100
            # A step of every image of the sequence, guided: the blocks' operations come from the arithmetic.
            blocks = 2 * 2 * 256 * sum(14 * 16**2 + 2 * (256 + tokens) * 16 for tokens in prefixes(model))
            assert row["flops_step"] == pytest.approx(blocks, rel=0.35)
        assert "transdiff_b_mrar" in (tmp_path / "run.md").read_text()
        assert (tmp_path / "run.png").stat().st_size > 0

        earlier = ["--models", "--earlier", str(tmp_path / "run.json")]
        sampling.main([*earlier, "--output", str(tmp_path / "again")])
        assert json.loads((tmp_path / "again.json").read_text())["settings"] == result["settings"]
        tables = [(tmp_path / name).read_text().split("\n\n")[2:] for name in ("run.md", "again.md")]
        assert tables[0] == tables[1]

    def test_flow_maps_beside_the_model_of_many_steps(self, tiny_models, tmp_path):
        sampling.main([
            "--models", *tiny_models, "--steps", "2", "--rounds", "2", "--flow-map", "--output", str(tmp_path / "run"),
        ])  # fmt: skip
        for setting in json.loads((tmp_path / "run.json").read_text())["settings"]:
            ours, *students = setting["rows"]
            assert [row["full_steps"] for row in students] == [4, 1]
            for student, entry in zip(students, setting["over_students"], strict=True):
                # One evaluation a call: guidance, which doubles ours, is built in.
                assert student["flops_step"] == pytest.approx(ours["flops_step"] / 2, rel=0.01)
                assert (entry["over"], entry["peer"]) == (student["peer"], ours["peer"])
                assert entry["operations_full"] > 2 * 100 / student["full_steps"] / 4
        assert "flow map, calls an image: 1: " in (tmp_path / "run.md").read_text()

    def test_half_precision_beside_float32(self, tiny_models, tmp_path):
        sampling.main([
            "--models", "transdiff_b", "--steps", "2", "--rounds", "2", "--dtypes", "float32", "bfloat16", "--float32",
            "--output", str(tmp_path / "run"),
        ])  # fmt: skip
        full, half = json.loads((tmp_path / "run.json").read_text())["settings"]
        assert [row["dtype"] for row in (*full["rows"], *half["rows"])] == ["float32", "bfloat16", "float32"]
        assert full["relative_error_to_float32"] is None
        assert 0 < half["relative_error_to_float32"] < 0.1
        assert half["comparisons"][0]["operations_step"] == 1
        assert f"{half['relative_error_to_float32']:.1e}" in (tmp_path / "run.md").read_text()

    def test_peers_are_compared_pair_by_pair(self):
        rows = [
            {"peer": name, "model": "m", "batch_size": 1, "dtype": "float32", "compiled": "off", "steps": steps}
            | dict.fromkeys(sampling.RATIOS, seconds)
            | {"flops_step": flops, "flops_before": 0, "full_steps": 100}
            for name, seconds, flops, steps in (
                ("ours", [1.0, 2.0, 4.0], 100, 4),
                ("same", [1.5, 2.0, 5.0], 110, 4),
                ("other", [3.0, 6.0, 12.0], 300, 2),
            )
        ]
        same, other = sampling.compare(rows)
        assert same["seconds"] == {"median": 1.25, "min": 1.0, "max": 1.5, "pairs": 3}
        assert same["operations_step"] == 1.1
        assert "seconds" not in other, "calls of different step counts do not compare"
        assert other["step_seconds"]["median"] == 3.0

    def test_growth(self, tiny_models, tmp_path, monkeypatch):
        monkeypatch.setattr(growth, "AXES", (growth.Axis("batch size", "images", (1, 2), steps=1),))
        growth.main(["--rounds", "1", "--output", str(tmp_path / "growth")])
        axis = json.loads((tmp_path / "growth.json").read_text())["axes"][0]
        assert [point["value"] for point in axis["points"]] == [1, 2]
        assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)

    def test_training(self, tiny_models, tmp_path):
        run = tmp_path / "metrics.jsonl"
        lines = [{"images_per_second": speed, "outside_fraction": 0.25, "data_fraction": 0.0} for speed in (1, 3, 9)]
        run.write_text("".join(json.dumps(line) + "\n" for line in lines))
        training.main([
            "--models", *tiny_models, "--batch-size", "1", "--rounds", "2",
            "--metrics", str(run), "--output", str(tmp_path / "run"),
        ])  # fmt: skip
        result = json.loads((tmp_path / "run.json").read_text())
        assert [(setting["part"], setting["images"]) for setting in result["settings"]] == [
            ("steps", 1), ("losses", 1), ("steps", 4), ("losses", 4),
        ]  # fmt: skip
        for setting in result["settings"][1::2]:
            once, tiled, packed = setting["rows"]
            assert tiled["ratio_flops"] > 1
            assert packed["ratio_flops"] >= 1 == once["ratio_flops"]
            assert len(once["seconds"]) == 2
        assert "3 images a second; outside the passes 25.0%" in (tmp_path / "run.md").read_text()

    def test_the_released_code_gets_the_published_sizes(self):
        arguments = constructor_arguments(published_model("transdiff_b_mrar"))
        assert (arguments["encoder_depth"], arguments["decoder_depth"], arguments["encoder_num_heads"]) == (12, 12, 12)
        uneven = replace(published_model("transdiff_b"), size=replace(SIZES["B"], encoder_layers=3))
        with pytest.raises(ValueError, match="3 encoder blocks; the released code has two"):
            constructor_arguments(uneven)

    def test_each_axis_of_growth_grows_what_it_says(self):
        base = Setting(published_model("transdiff_b"), 1, 4, torch.float32, "off", CPU)
        batch, steps, resolution, images = (growth.setting_at(axis, axis.values[-1], base) for axis in growth.AXES)
        assert (batch.batch_size, steps.steps) == (8, 16)
        assert resolution.model.latent_size == 32
        assert images.model.num_images == 64

    def test_few_steps_on_known_flows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(few_steps, "FIXED_GRID", (EULER_MARUYAMA, SDE_2))
        few_steps.main(["--parts", "flows", "--mixture-samples", "500", "--output", str(tmp_path / "run")])
        rows = json.loads((tmp_path / "run_flows.json").read_text())["samplers"]
        assert [round(row["order"]) for row in rows] == [1, 2]

    def test_few_steps_on_a_model(self, tmp_path, monkeypatch):
        """The same settings from kept pixels are the same numbers."""
        drawn = []

        def generate(pipeline, labels, seed, num_inference_steps):
            drawn.append(num_inference_steps)
            images = torch.rand(len(labels), 32, 32, 3, generator=seeded(seed)).numpy().astype(np.float64)
            return images * labels[:, None, None, None] / 9

        monkeypatch.setattr(few_steps, "generate", generate)
        pixels = 16 * np.random.default_rng(0).random((80, 64)), np.arange(80) % 10
        monkeypatch.setattr(few_steps, "load_pixels", lambda *_: pixels)
        monkeypatch.setattr(few_steps.TransDiffPipeline, "from_pretrained", lambda *_: tiny_pipeline(1))
        monkeypatch.setattr(few_steps, "ratio_with_interval", partial(few_steps.ratio_with_interval, replicates=10))
        command = [
            "--parts",
            "digits",
            "--data",
            "none",
            "--num-images",
            "100",
            "--calls",
            "5",
            "--keep",
            str(tmp_path),
        ]
        for output in ("first", "second"):
            few_steps.main([*command, "--samplers", SDE_2.name, HEUN_ODE.name, "--output", str(tmp_path / output)])
        assert drawn == [100, 5, 3]
        first, second = (json.loads((tmp_path / f"{name}_digits.json").read_text()) for name in ("first", "second"))
        assert first["rows"] == second["rows"]
        assert [row["calls"] for row in first["rows"]] == [5, 5]
        few_steps.main([
            *command, "--samplers", SDE_2.name, "--student", "folder", "--output", str(tmp_path / "third"),
        ])  # fmt: skip
        assert drawn[3:] == [1, 2, 3, 4] * 2
        third = json.loads((tmp_path / "third_digits.json").read_text())["rows"]
        assert [row["sampler"] for row in third[1::4]] == ["flow map", "flow map, renoise 0.2"]
        assert [row["calls"] for row in third[1:]] == [1, 2, 3, 4] * 2
        assert all(0 <= row["recognised"] <= 1 and row["variance"] > 0 for row in third)
        assert "| flow map | 1 | 1 |" in (tmp_path / "third_digits.md").read_text()
        other = tiny_pipeline(1)
        with torch.no_grad():
            other.transformer.proj_out.bias.add_(0.1)
        monkeypatch.setattr(few_steps.TransDiffPipeline, "from_pretrained", lambda *_: other)
        few_steps.main([*command, "--samplers", SDE_2.name, "--output", str(tmp_path / "fourth")])
        assert drawn[11:] == [100, 5]  # what other weights drew is not taken for theirs

    def test_digits_need_data(self, capsys):
        with pytest.raises(SystemExit):
            few_steps.parse(["--parts", "digits", "--output", "x"])
        assert "--data is needed" in capsys.readouterr().err


def prefixes(model):
    tokens = 256 // model.num_images
    return [tokens * (i + 1) for i in range(model.num_images)]


def test_our_pipeline_runs_a_setting(tiny_models):
    setting = Setting(tiny_models["transdiff_b"], 2, 2, torch.float32, "off", CPU)
    ours = OurPipeline(setting, peers.random_pipeline(setting.model))
    latents = ours.sample(2)
    assert latents.shape == (2, 16, 16, 16)
    assert ours.weight_bytes() > 0
