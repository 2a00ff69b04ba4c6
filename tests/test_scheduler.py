"""The Euler-Maruyama scheduler: its equations, its distribution, and diffusers' scheduler surface."""

import math

import numpy as np
import pytest
import torch
from tiny import seeded

from transdiff_pipelines import FlowMatchEulerMaruyamaScheduler


def run(scheduler, velocity, sample, steps=None, **kwargs):
    """Integrate from `sample` with `velocity(x, sigma)`."""
    scheduler.set_timesteps(steps, **kwargs)
    generator = seeded(1)
    for timestep in scheduler.timesteps:
        v = velocity(sample, timestep.item() / scheduler.config.num_train_timesteps)
        sample = scheduler.step(v, timestep, sample, generator=generator).prev_sample
    return sample


def gaussian_velocity(mean: float, std: float):
    """Exact velocity E[ε - x₀ | x_σ] for data of N(mean, std²)."""

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        noise_share = (sigma - (1 - sigma) * std**2) / variance
        return -mean + noise_share * (x - (1 - sigma) * mean)

    return velocity


class TestDevices:
    def test_a_default_device_does_not_split_the_grid(self):
        with torch.device("meta"):
            scheduler = FlowMatchEulerMaruyamaScheduler()
            scheduler.set_timesteps(device="cpu", sigmas=[1.0, 0.5])
        assert {scheduler.sigmas.device.type, scheduler.timesteps.device.type} == {"cpu"}

    def test_a_step_has_one_timestep(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(3)
        x = torch.zeros(2, 1, 1, 1)
        scheduler.step(x, scheduler.timesteps[:1], x)
        scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match=r"timestep has shape \(2,\); a step has one for the whole batch"):
            scheduler.step(x, scheduler.timesteps[0].expand(2), x)


class TestGrid:
    @pytest.mark.parametrize("steps", [1, 2, 7, 100])
    def test_default_grid(self, steps):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(steps)
        expected = np.append(np.linspace(1, 0.04, steps), 0)
        np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, atol=1e-7)
        np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * expected[:-1], atol=1e-4)
        assert scheduler.timesteps.dtype == torch.float32

    def test_custom_sigmas(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.1])
        np.testing.assert_allclose(scheduler.sigmas.numpy(), [1, 0.5, 0.1, 0])
        assert scheduler.num_inference_steps == 3

    def test_shift(self):
        scheduler = FlowMatchEulerMaruyamaScheduler(shift=3.0)
        scheduler.set_timesteps(5)
        grid = np.linspace(1, 0.04, 5)
        np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), 3 * grid / (1 + 2 * grid), atol=1e-6)

    @pytest.mark.parametrize("sigmas", [[], [0.5, 0.5], [0.2, 0.8], [1.5, 0.5], [0.5, 0.0], [[1.0, 0.5]]])
    def test_bad_sigmas(self, sigmas):
        with pytest.raises(ValueError, match="strictly decreasing values in"):
            FlowMatchEulerMaruyamaScheduler().set_timesteps(sigmas=sigmas)

    @pytest.mark.parametrize("steps", [0, -3, None])
    def test_bad_step_count(self, steps):
        with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
            FlowMatchEulerMaruyamaScheduler().set_timesteps(steps)

    def test_steps_and_sigmas_must_agree(self):
        with pytest.raises(ValueError, match="num_inference_steps is 3 but 2 sigmas"):
            FlowMatchEulerMaruyamaScheduler().set_timesteps(3, sigmas=[1.0, 0.5])

    def test_training_grid_before_set_timesteps(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        assert len(scheduler) == len(scheduler.timesteps) == 1000
        assert scheduler.timesteps[0] == 1000
        assert scheduler.timesteps[-1] == 1


class TestStep:
    def test_equation_18(self):
        scheduler = FlowMatchEulerMaruyamaScheduler(drift_scale=0.87, diffusion_scale=0.91)
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.25])
        x, v, z = torch.randn(3, 2, 4, 3, 3, generator=seeded()).unbind(0)
        scheduler.step(v, scheduler.timesteps[0], x)
        result = scheduler.step(v, scheduler.timesteps[1], x, variance_noise=z).prev_sample
        dsigma = 0.25 - 0.6
        expected = x + 0.87 * ((2 - 0.6) * v + x) * dsigma + 0.91 * math.sqrt(2 * 0.6) * math.sqrt(-dsigma) * z
        torch.testing.assert_close(result, expected)

    def test_drift_is_velocity_minus_half_w_score(self):
        """The closed form equals v - ½ w s with s = -((1 - σ) v + x) / σ and w = 2σ."""
        scheduler = FlowMatchEulerMaruyamaScheduler(diffusion_scale=0.0)
        scheduler.set_timesteps(sigmas=[0.7, 0.3])
        x, v = torch.randn(2, 1, 4, 3, 3, generator=seeded()).unbind(0)
        score = -((1 - 0.7) * v + x) / 0.7
        drift = v - 0.5 * (2 * 0.7) * score
        result = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
        torch.testing.assert_close(result, x + drift * (0.3 - 0.7))

    def test_last_step_knows_neither_scale_nor_noise(self):
        x, v, z = torch.randn(3, 2, 4, 3, 3, generator=seeded()).unbind(0)
        scheduler = FlowMatchEulerMaruyamaScheduler(drift_scale=0.5, diffusion_scale=0.5)
        scheduler.set_timesteps(sigmas=[0.04])
        result = scheduler.step(v, scheduler.timesteps[0], x, variance_noise=z).prev_sample
        torch.testing.assert_close(result, x - 0.04 * ((2 - 0.04) * v + x))

    def test_zero_diffusion_is_deterministic(self):
        scheduler = FlowMatchEulerMaruyamaScheduler(diffusion_scale=0.0)
        x = torch.randn(2, 4, 3, 3, generator=seeded())
        torch.manual_seed(0)
        first = run(scheduler, gaussian_velocity(1, 0.5), x, 10)
        torch.manual_seed(1)
        assert torch.equal(run(scheduler, gaussian_velocity(1, 0.5), x, 10), first)

    def test_generator_decides_the_noise(self):
        x, v = torch.randn(2, 2, 4, 3, 3, generator=seeded()).unbind(0)

        def first_step(generator):
            scheduler = FlowMatchEulerMaruyamaScheduler()
            scheduler.set_timesteps(10)
            return scheduler.step(v, scheduler.timesteps[0], x, generator=generator).prev_sample

        assert torch.equal(first_step(seeded(3)), first_step(seeded(3)))
        assert not torch.equal(first_step(seeded(3)), first_step(seeded(4)))
        each = first_step([seeded(5), seeded(6)])
        for i, seed in enumerate((5, 6)):
            scheduler = FlowMatchEulerMaruyamaScheduler()
            scheduler.set_timesteps(10)
            alone = scheduler.step(v[i : i + 1], scheduler.timesteps[0], x[i : i + 1], generator=[seeded(seed)])
            torch.testing.assert_close(alone.prev_sample, each[i : i + 1])

    def test_samples_the_distribution_of_a_known_flow(self):
        """Exact velocity of N(2, 0.5²) data: mean and deviation come out right, and better with more steps."""
        noise = torch.randn(100_000, generator=seeded())
        errors = []
        for steps in (20, 200):
            samples = run(FlowMatchEulerMaruyamaScheduler(), gaussian_velocity(2.0, 0.5), noise, steps)
            errors.append(max(abs(samples.mean().item() - 2.0), abs(samples.std().item() - 0.5)))
        assert errors[1] < 0.01
        assert errors[1] < errors[0]

    def test_low_precision_sample_keeps_its_dtype(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(10)
        x = torch.randn(1, 4, 3, 3).bfloat16()
        assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == torch.bfloat16

    def test_velocity_of_lower_precision_does_not_lower_the_sample(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(10)
        x = torch.randn(1, 4, 3, 3)
        assert scheduler.step(x.bfloat16(), scheduler.timesteps[0], x).prev_sample.dtype == torch.float32

    def test_timestep_off_the_grid(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="timestep 500.0 is not on the grid"):
            scheduler.step(torch.zeros(1), torch.tensor(500.0), torch.zeros(1))

    def test_step_past_the_end(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(1)
        x = torch.zeros(1, 1, 2, 2)
        scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="call set_timesteps"):
            scheduler.step(x, scheduler.timesteps[0], x)

    def test_begin_index_starts_in_the_middle(self):
        x, v = torch.randn(2, 1, 4, 3, 3, generator=seeded()).unbind(0)
        by_timestep, by_index = FlowMatchEulerMaruyamaScheduler(), FlowMatchEulerMaruyamaScheduler()
        for scheduler in (by_timestep, by_index):
            scheduler.set_timesteps(10)
        by_index.set_begin_index(6)
        results = [s.step(v, s.timesteps[6], x, generator=seeded(1)).prev_sample for s in (by_timestep, by_index)]
        assert torch.equal(*results)
        assert by_timestep.step_index == by_index.step_index == 7

    def test_tuple_output(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(3)
        x = torch.randn(1, 4, 3, 3)
        (sample,) = scheduler.step(x, scheduler.timesteps[0], x, generator=seeded(), return_dict=False)
        scheduler.set_timesteps(3)
        assert torch.equal(sample, scheduler.step(x, scheduler.timesteps[0], x, generator=seeded()).prev_sample)


class TestSurface:
    def test_scale_noise(self):
        clean, noise = torch.randn(2, 3, 4, 2, 2, generator=seeded()).unbind(0)
        scheduler = FlowMatchEulerMaruyamaScheduler()
        timesteps = torch.tensor([0.0, 250.0, 1000.0])
        noisy = scheduler.scale_noise(clean, timesteps, noise)
        torch.testing.assert_close(noisy[0], clean[0])
        torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
        torch.testing.assert_close(noisy[2], noise[2])
        torch.testing.assert_close(scheduler.scale_noise(clean, 250.0, noise), 0.75 * clean + 0.25 * noise)

    def test_plain_members(self):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        x = torch.randn(2, 2)
        assert scheduler.init_noise_sigma == 1.0
        assert scheduler.order == 1
        assert scheduler.scale_model_input(x, 5) is x

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"sigma_last": 0.0}, "sigma_last is 0.0"),
            ({"drift_scale": -1.0}, "drift_scale is -1.0"),
            ({"diffusion_scale": float("nan")}, "diffusion_scale is nan"),
            ({"shift": 0.0}, "shift is 0.0"),
            ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ],
    )
    def test_bad_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            FlowMatchEulerMaruyamaScheduler(**config)
