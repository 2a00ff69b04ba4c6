"""Flow maps: the model told where it goes, and the sampler that goes there in one call."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch._dynamo.utils import counters

from tests.rounding import assert_close
from tests.tiny import CHANNELS, SIDE, seeded, tiny_transformer
from transdiff_pipelines import (
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffTransformer2DModel,
)


LAYERS = 3
MEAN, STD = 2.0, 0.5


def flow_map(num_flow_map_layers=2, **config):
    return tiny_transformer(num_layers=LAYERS, num_flow_map_layers=num_flow_map_layers, **config)


def inputs(batch_size=3, dtype=torch.float32):
    generator = seeded()
    return {
        "hidden_states": torch.randn(batch_size, CHANNELS, SIDE, SIDE, generator=generator, dtype=dtype),
        "timestep": torch.linspace(900, 400, batch_size),
        "encoder_hidden_states": torch.randn(batch_size, 8, 16, generator=generator, dtype=dtype),
    }


def path_std(sigma, std=STD):
    """Standard deviation of x_σ for data of N(·, std²)."""
    return math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)


def gaussian_average_velocity(x, t, r):
    """u = (x_t - x_r) / (t - r) along the ODE of N(MEAN, STD²) data, whose paths keep their quantile."""
    x_r = (1 - r) * MEAN + (x - (1 - t) * MEAN) * path_std(r) / path_std(t)
    return (x - x_r) / (t - r)


def run(scheduler, x, average_velocity, **kwargs):
    for timestep, next_timestep in zip(scheduler.timesteps, scheduler.next_timesteps, strict=True):
        u = average_velocity(x, timestep.item() / 1000, next_timestep.item() / 1000)
        x = scheduler.step(u, timestep, x, **kwargs).prev_sample
    return x


class TestModel:
    @pytest.mark.parametrize("layers", range(1, LAYERS + 1))
    def test_at_equal_times_it_is_the_velocity_model(self, layers):
        """Bit for bit: one timestep for the batch, one for each sample, and none given."""
        velocity_model, student, given = flow_map(0), flow_map(layers), inputs()
        for timestep in (given["timestep"], torch.tensor(640.0), 640):
            given["timestep"] = timestep
            expected = velocity_model(**given).sample
            assert torch.equal(student(**given).sample, expected)
            assert torch.equal(student(**given, next_timestep=timestep).sample, expected)

    def test_no_weight_is_new_and_the_config_tells(self, tmp_path):
        velocity_model = flow_map(0)
        velocity_model.save_pretrained(tmp_path / "velocity")
        student = TransDiffTransformer2DModel.from_pretrained(tmp_path / "velocity", num_flow_map_layers=2)
        student.save_pretrained(tmp_path / "student")
        loaded = TransDiffTransformer2DModel.from_pretrained(tmp_path / "student")
        assert loaded.config.num_flow_map_layers == 2
        weights = velocity_model.state_dict()
        assert {name: torch.equal(value, weights[name]) for name, value in loaded.state_dict().items()} == (
            dict.fromkeys(weights, True)
        )

    @pytest.mark.parametrize("layers", range(1, LAYERS + 1))
    def test_the_next_time_reaches_the_last_blocks_and_the_final_layer_alone(self, layers):
        student, given, outputs = flow_map(layers), inputs(), []
        for block in student.transformer_blocks:
            block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
        results = [student(**given, next_timestep=given["timestep"] * share).sample for share in (0.5, 0.1)]
        first, second = outputs[:LAYERS], outputs[LAYERS:]
        same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
        assert same == [True] * (LAYERS - layers) + [False] * layers
        assert not torch.equal(*results)
        # the first blocks see the time itself, and of the last ones and the final layer none does
        outputs.clear()
        next_timestep = given["timestep"] * 0.1
        student(**{**given, "timestep": given["timestep"] * 0.8}, next_timestep=next_timestep)
        assert torch.equal(outputs[0], second[0]) == (layers == LAYERS)

    def test_final_layer_sees_the_next_time(self):
        """Between blocks that do nothing it alone can tell next times apart, and it does not see the time."""
        student, given = flow_map(1), inputs()
        for block in student.transformer_blocks:
            block.register_forward_hook(lambda _, arguments, __: arguments[0])
        here = student(**given, next_timestep=300.0).sample
        assert not torch.equal(student(**given, next_timestep=100.0).sample, here)
        given["timestep"] = given["timestep"] + 50
        assert torch.equal(student(**given, next_timestep=300.0).sample, here)

    def test_each_sample_has_a_next_time_of_its_own(self):
        student, given = flow_map().double(), inputs(dtype=torch.float64)
        next_timestep = torch.tensor([0.0, 250.0, 100.0])
        together = student(**given, next_timestep=next_timestep).sample
        for i in range(3):
            alone = {name: value[i : i + 1] for name, value in given.items()}
            expected = student(**alone, next_timestep=next_timestep[i].item()).sample
            torch.testing.assert_close(together[i : i + 1], expected)

    def test_one_next_time_beside_a_time_for_each_sample(self):
        student, given = flow_map().double(), inputs(dtype=torch.float64)
        each = student(**given, next_timestep=torch.full((3,), 120.0)).sample
        torch.testing.assert_close(student(**given, next_timestep=120).sample, each)

    def test_projected_conditions_serve(self):
        student, given = flow_map().double(), inputs(dtype=torch.float64)
        expected = student(**given, next_timestep=0.0).sample
        given["encoder_hidden_states"] = student.project_condition(given["encoder_hidden_states"])
        torch.testing.assert_close(student(**given, next_timestep=0.0).sample, expected)

    def test_gradients_reach_every_weight_and_both_times(self):
        student, given = flow_map(), inputs()
        given["timestep"].requires_grad_()
        next_timestep = torch.tensor([10.0, 20.0, 30.0], requires_grad=True)
        student(**given, next_timestep=next_timestep).sample.square().mean().backward()
        assert [name for name, p in student.named_parameters() if p.grad is None] == []
        assert given["timestep"].grad.abs().min() > 0
        assert next_timestep.grad.abs().min() > 0

    def test_gradient_checkpointing_changes_no_gradient(self):
        gradients = []
        for checkpointing in (False, True):
            student = flow_map(dropout=0.0).double().train()
            if checkpointing:
                student.enable_gradient_checkpointing()
            output = student(**inputs(dtype=torch.float64), next_timestep=torch.tensor([0.0, 10.0, 20.0])).sample
            output.square().mean().backward()
            gradients.append([parameter.grad for parameter in student.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, checkpointed)

    def test_compiled_once_for_all_times(self):
        torch._dynamo.reset()
        counters.clear()
        student, given = flow_map(), inputs()
        with torch.no_grad():
            expected = student(**given, next_timestep=torch.tensor(100.0)).sample
            student.compile(backend="eager", fullgraph=True)
            for next_timestep in (900.0, 0.0, 100.0):
                result = student(**given, next_timestep=torch.tensor(next_timestep)).sample
        assert_close(result, expected)
        assert counters["stats"]["unique_graphs"] == 1
        torch._dynamo.reset()

    def test_low_precision_tells_neighbouring_next_times_apart(self):
        student = flow_map().to(torch.bfloat16)
        given = {name: value.bfloat16() for name, value in inputs().items()} | {"timestep": torch.tensor(1000.0)}
        results = [student(**given, next_timestep=torch.tensor(value)).sample for value in (960.0, 962.0)]
        assert not torch.equal(*results)

    def test_a_velocity_model_has_no_next_time(self):
        with pytest.raises(ValueError, match="next_timestep was given to a velocity model .*num_flow_map_layers=0"):
            flow_map(0)(**inputs(), next_timestep=0.0)

    @pytest.mark.parametrize("layers", [-1, LAYERS + 1])
    def test_no_more_layers_than_there_are(self, layers):
        with pytest.raises(
            ValueError, match=f"num_flow_map_layers is {layers}; expected 0 .* to num_layers, {LAYERS}"
        ):
            flow_map(layers)


class TestGrid:
    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 50])
    def test_from_noise_to_data_in_equal_intervals(self, steps):
        scheduler = FlowMapScheduler()
        scheduler.set_timesteps(steps)
        expected = np.linspace(1, 0, steps + 1)
        np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, atol=1e-7)
        np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * expected[:-1], atol=1e-4)
        np.testing.assert_allclose(scheduler.next_timesteps.numpy(), 1000 * expected[1:], atol=1e-4)
        assert scheduler.timesteps.dtype == scheduler.next_timesteps.dtype == torch.float32

    def test_shift(self):
        scheduler = FlowMapScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        grid = np.linspace(1, 0, 5)
        np.testing.assert_allclose(scheduler.sigmas.numpy(), 3 * grid / (1 + 2 * grid), atol=1e-6)
        assert torch.equal(scheduler.next_timesteps[:-1], scheduler.timesteps[1:])

    def test_custom_sigmas(self):
        scheduler = FlowMapScheduler()
        scheduler.set_timesteps(sigmas=[1.0, 0.7])
        np.testing.assert_allclose(scheduler.timesteps.numpy(), [1000, 700], atol=1e-4)
        np.testing.assert_allclose(scheduler.next_timesteps.numpy(), [700, 0], atol=1e-4)

    def test_next_times_lie_beyond_the_grid_where_noise_leads_back(self):
        scheduler = FlowMapScheduler(renoise=0.25)
        scheduler.set_timesteps(4)
        np.testing.assert_allclose(scheduler.timesteps.numpy(), [1000, 750, 500, 250])
        np.testing.assert_allclose(scheduler.next_timesteps.numpy(), [562.5, 375, 187.5, 0])

    def test_grids_live_where_they_are_asked_to(self):
        with torch.device("meta"):
            scheduler = FlowMapScheduler()
            scheduler.set_timesteps(2, device="cpu")
        assert {scheduler.timesteps.device.type, scheduler.next_timesteps.device.type} == {"cpu"}
        scheduler.set_timesteps(2, device="meta")
        assert {scheduler.timesteps.device.type, scheduler.next_timesteps.device.type} == {"meta"}

    def test_before_set_timesteps_the_training_grid(self):
        scheduler = FlowMapScheduler()
        assert len(scheduler) == len(scheduler.timesteps) == len(scheduler.next_timesteps) == 1000
        assert (scheduler.timesteps[0], scheduler.next_timesteps[-1]) == (1000, 0)


class TestKnownFlow:
    """Gaussian data: the flow map is known, noise ε goes to MEAN + STD ε."""

    @pytest.mark.parametrize("shift", [1.0, 2.5])
    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 17])
    def test_exact_with_any_number_of_calls(self, steps, shift):
        noise = torch.randn(1000, 1, generator=seeded(), dtype=torch.float64)
        scheduler = FlowMapScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(
            run(scheduler, noise, gaussian_average_velocity), MEAN + STD * noise, rtol=0, atol=1e-5
        )

    def test_exact_on_a_grid_of_the_callers_own(self):
        noise = torch.randn(100, 1, generator=seeded(), dtype=torch.float64)
        scheduler = FlowMapScheduler()
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.15])
        expected = MEAN + STD * noise
        torch.testing.assert_close(run(scheduler, noise, gaussian_average_velocity), expected, rtol=0, atol=1e-5)

    def test_a_run_may_begin_anywhere(self):
        """From x_t on its path, as editing begins: the rest of the run ends where the whole does."""
        noise = torch.randn(100, 1, generator=seeded(), dtype=torch.float64)
        scheduler = FlowMapScheduler()
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        x = 0.5 * MEAN + path_std(0.5) * noise
        for i in (2, 3):
            u = gaussian_average_velocity(x, scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item())
            x = scheduler.step(u, scheduler.timesteps[i], x).prev_sample
        torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("renoise", [0.2, 1.0])
    @pytest.mark.parametrize("steps", [2, 5])
    def test_with_noise_between_calls_the_distribution_stays(self, steps, renoise):
        """Without sampling: deviations from the mean are linear in the independent draws, and followed as such."""
        scheduler = FlowMapScheduler(renoise=renoise)
        scheduler.set_timesteps(steps)
        draws = torch.eye(steps, dtype=torch.float64)
        x = draws[0]
        for i in range(steps):
            t, s = (grid[i].item() / 1000 for grid in (scheduler.timesteps, scheduler.next_timesteps))
            u = x * (1 - path_std(s) / path_std(t)) / (t - s)
            noise = draws[(i + 1) % steps]  # the last step draws none
            x = scheduler.step(u, scheduler.timesteps[i], x, variance_noise=noise).prev_sample
            assert x.norm().item() == pytest.approx(path_std(scheduler.sigmas[i + 1].item()), abs=1e-5)
        if renoise == 1:
            assert x[0].abs() < x[-1].abs()  # most of the first noise is gone

    def test_noise_comes_from_the_generator_and_only_where_it_is_wanted(self):
        x = torch.randn(2, 4, 3, 3, generator=seeded())

        def sample(generator, **config):
            scheduler = FlowMapScheduler(**config)
            scheduler.set_timesteps(3)
            return run(scheduler, x, gaussian_average_velocity, generator=generator)

        assert torch.equal(sample(seeded(1)), sample(seeded(2)))
        assert torch.equal(sample(seeded(1), renoise=0.5), sample(seeded(1), renoise=0.5))
        assert not torch.equal(sample(seeded(1), renoise=0.5), sample(seeded(2), renoise=0.5))
        each = sample([seeded(5), seeded(6)], renoise=0.5)
        x = x[1:]
        assert torch.equal(sample([seeded(6)], renoise=0.5), each[1:])


class TestSurface:
    @pytest.mark.parametrize("other", FlowMapScheduler._compatibles)
    def test_there_and_back_nothing_is_lost_or_logged(self, other, caplog):
        cls = next(known for known in FlowMapScheduler().compatibles if known.__name__ == other)
        for scheduler in (
            FlowMapScheduler(renoise=0.3, shift=2.0),
            cls.from_config(FlowMapScheduler(shift=2.0).config),
        ):
            original = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
            swapped = (cls if type(scheduler) is FlowMapScheduler else FlowMapScheduler).from_config(scheduler.config)
            back = type(scheduler).from_config(swapped.config)
            assert back.config.items() >= original.items()
        assert not caplog.records

    def test_made_from_the_papers_scheduler_and_back(self):
        paper = FlowMatchEulerMaruyamaScheduler(drift_scale=0.87, diffusion_scale=0.91)
        back = FlowMatchEulerMaruyamaScheduler.from_config(FlowMapScheduler.from_config(paper.config).config)
        assert (back.config.drift_scale, back.config.diffusion_scale) == (0.87, 0.91)

    def test_a_shift_goes_along(self):
        config = FlowMapScheduler(shift=3.0).config
        assert FlowMatchEulerDiscreteScheduler.from_config(config).shift == 3.0
        assert UniPCMultistepScheduler.from_config(config).config.flow_shift == 3.0
        assert UniPCMultistepScheduler.from_config(config).config.prediction_type == "flow_prediction"
        assert FlowMatchSDEMultistepScheduler.from_config(config).config.shift == 3.0

    def test_saved_and_loaded(self, tmp_path):
        FlowMapScheduler(renoise=0.3).save_pretrained(tmp_path)
        assert FlowMapScheduler.from_pretrained(tmp_path).config.renoise == 0.3

    def test_noising_lies_on_the_path(self):
        clean, noise = torch.randn(2, 3, 4, 2, 2, generator=seeded()).unbind(0)
        timesteps = torch.tensor([0.0, 250.0, 1000.0])
        noisy = FlowMapScheduler().add_noise(clean, noise, timesteps)
        torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
        assert torch.equal(noisy, FlowMapScheduler().scale_noise(clean, timesteps, noise))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"renoise": -0.1}, r"renoise is -0.1; it must lie in \[0, 1\]"),
            ({"renoise": 1.5}, "renoise is 1.5"),
            ({"renoise": float("nan")}, "renoise is nan"),
            ({"shift": 0.0}, "shift is 0.0"),
            ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ],
    )
    def test_bad_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            FlowMapScheduler(**config)

    def test_bad_steps(self):
        with pytest.raises(ValueError, match="num_inference_steps is 0"):
            FlowMapScheduler().set_timesteps(0)
        with pytest.raises(ValueError, match="strictly decreasing"):
            FlowMapScheduler().set_timesteps(sigmas=[0.5, 0.5])

    def test_past_the_end(self):
        scheduler, x = FlowMapScheduler(), torch.zeros(1, 1, 2, 2)
        scheduler.set_timesteps(1)
        scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="call set_timesteps"):
            scheduler.step(x, scheduler.timesteps[0], x)
