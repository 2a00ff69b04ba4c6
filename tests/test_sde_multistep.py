"""The exponential integrator: exact where the theory says so, second order elsewhere."""

import math

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from rounding import assert_close
from test_scheduler import gaussian_velocity, run
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler


def one_step(sigma, sigma_next, drift_scale=1.0, diffusion_scale=1.0):
    """Result of the first step between two sigmas, with its ingredients."""
    scheduler = FlowMatchSDEMultistepScheduler(drift_scale=drift_scale, diffusion_scale=diffusion_scale)
    scheduler.set_timesteps(sigmas=[sigma, sigma_next])
    x, v, z = torch.randn(3, 2, 4, 3, 3, generator=seeded(), dtype=torch.float64).unbind(0)
    result = scheduler.step(v, scheduler.timesteps[0], x, variance_noise=z).prev_sample
    return result, x, v, z


def test_exact_transition_at_unit_scales():
    """x_s = (s/t)² x_t + [(1 - s) - (s/t)² (1 - t)] x₀ + s √(1 - (s/t)²) z."""
    t, s = 0.8, 0.3
    result, x, v, z = one_step(t, s)
    x0, ratio = x - t * v, (s / t) ** 2
    expected = ratio * x + ((1 - s) - ratio * (1 - t)) * x0 + s * math.sqrt(1 - ratio) * z
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("drift_scale", [0.5, 0.87, 1.0, 1.2])
@pytest.mark.parametrize("diffusion_scale", [0.0, 0.91])
def test_a_step_equals_many_small_euler_steps_at_constant_x0(drift_scale, diffusion_scale):
    """Mean and variance of the linear SDE with x₀ held, integrated numerically; a = 1/2 is no exception."""
    t, s, n = 0.9, 0.4, 2000
    result, x, v, z = one_step(t, s, drift_scale, diffusion_scale)
    x0 = x - t * v
    dt = (s - t) / n

    def derivative(u, mean, variance):
        drift = drift_scale * ((2 - u) * (mean - x0) / u + mean)
        # dx = a [...] dt: the factor on x is a ((2 - u) / u + 1) = 2 a / u
        return drift, 2 * (2 * drift_scale / u) * variance - 2 * u * diffusion_scale**2

    mean, variance = x, 0.0
    for i in range(n):
        u = t + i * dt
        slope_mean, slope_variance = derivative(u, mean, variance)
        # explicit midpoint, second order
        slopes = derivative(u + dt / 2, mean + slope_mean * dt / 2, variance + slope_variance * dt / 2)
        mean, variance = mean + slopes[0] * dt, variance + slopes[1] * dt
    torch.testing.assert_close(result, mean + math.sqrt(variance) * z, rtol=1e-5, atol=1e-5)


def test_last_step_is_the_prediction():
    scheduler = FlowMatchSDEMultistepScheduler()
    scheduler.set_timesteps(sigmas=[0.3])
    x, v = torch.randn(2, 1, 4, 3, 3, generator=seeded()).unbind(0)
    torch.testing.assert_close(scheduler.step(v, scheduler.timesteps[0], x).prev_sample, x - 0.3 * v)


def test_nothing_is_kept_after_the_last_step():
    scheduler = FlowMatchSDEMultistepScheduler()
    run(scheduler, gaussian_velocity(1.5, 0.5), torch.randn(10, generator=seeded()), 4)
    assert scheduler._previous is None


def test_an_order_of_another_scheduler_is_an_error_that_says_what_to_pass():
    config = UniPCMultistepScheduler.from_config(FlowMatchEulerMaruyamaScheduler().config, solver_order=3).config
    with pytest.raises(ValueError, match=r"solver_order is 3; .*from_config\(config, solver_order=2\)"):
        FlowMatchSDEMultistepScheduler.from_config(config)
    assert FlowMatchSDEMultistepScheduler.from_config(config, solver_order=2).config.solver_order == 2


@pytest.mark.parametrize("order", [1, 2])
def test_one_image_is_sampled_exactly_with_any_steps(order):
    """Data of a single point: the prediction x₀ is right everywhere, so one step or ten end on it."""
    for steps in (1, 3, 10):
        scheduler = FlowMatchSDEMultistepScheduler(solver_order=order)
        samples = run(scheduler, gaussian_velocity(1.5, 0.0), torch.randn(100, generator=seeded()), steps)
        assert_close(samples, torch.full_like(samples, 1.5))


def gaussian_std_error(scheduler, steps: int, std: float = 0.5) -> float:
    """Error of the sampled standard deviation for N(0, std²) data, computed without sampling.

    The scheme is linear for Gaussian data: x is followed as its coefficients on the independent normal draws.
    """
    scheduler.set_timesteps(sigmas=torch.linspace(0.98, 0.02, steps, dtype=torch.float64))
    draws = torch.eye(steps + 1, dtype=torch.float64)
    sigma = scheduler.sigmas[0].item()
    x = draws[0] * math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
    velocity = gaussian_velocity(0.0, std)
    for i, timestep in enumerate(scheduler.timesteps):
        v = velocity(x, scheduler.sigmas[i].item())
        if i == steps - 1:
            break  # at sigma 0.02 for every scheme and step count: the final jump is no part of the comparison
        x = scheduler.step(v, timestep, x, variance_noise=draws[i + 1]).prev_sample
    expected = math.sqrt((1 - 0.02) ** 2 * std**2 + 0.02**2)
    return abs(x.norm().item() - expected)


def slope(scheduler, steps=(40, 80, 160)) -> float:
    """Order of convergence, from errors at doubled step counts."""
    errors = [gaussian_std_error(scheduler, n) for n in steps]
    return math.log2(errors[0] / errors[-1]) / (len(steps) - 1)


def test_order_of_convergence():
    first = slope(FlowMatchSDEMultistepScheduler(solver_order=1))
    second = slope(FlowMatchSDEMultistepScheduler(solver_order=2))
    euler_maruyama = slope(FlowMatchEulerMaruyamaScheduler())
    assert 0.8 < first < 1.3
    assert 0.8 < euler_maruyama < 1.3
    assert second > 1.7


def mixture_velocity(means, stds, weights):
    """Exact velocity of a one-dimensional mixture of Gaussians."""

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * stds**2 + sigma**2
        distance = x[:, None] - (1 - sigma) * means
        share = (weights.log() - 0.5 * variance.log() - distance**2 / (2 * variance)).softmax(1)
        x0 = means + (1 - sigma) * stds**2 / variance * distance
        noise = sigma / variance * distance
        return (share * (noise - x0)).sum(1)

    return velocity


@pytest.mark.parametrize("calls", [10, 20, 40])
def test_nearer_to_a_mixture_than_euler_maruyama_at_equal_calls(calls):
    """Wasserstein-1 distance of samples to the data."""
    means, stds, weights = (
        torch.tensor([-2.0, 0.3, 1.5]),
        torch.tensor([0.3, 0.15, 0.5]),
        torch.tensor([0.3, 0.3, 0.4]),
    )
    generator, n = seeded(), 20_000
    component = torch.multinomial(weights, n, replacement=True, generator=generator)
    data = (means[component] + stds[component] * torch.randn(n, generator=generator)).sort().values
    noise = torch.randn(n, generator=generator)

    def distance(scheduler):
        samples = run(scheduler, mixture_velocity(means, stds, weights), noise, calls)
        return (samples.sort().values - data).abs().mean().item()

    bound = 1.0 if calls == 10 else 0.7
    assert distance(FlowMatchSDEMultistepScheduler()) < bound * distance(FlowMatchEulerMaruyamaScheduler())


def test_a_new_run_forgets_the_last_one():
    scheduler, x = FlowMatchSDEMultistepScheduler(), torch.randn(10, generator=seeded())
    first = run(scheduler, gaussian_velocity(1.0, 0.5), x, 6)
    assert torch.equal(run(scheduler, gaussian_velocity(1.0, 0.5), x, 6), first)


def test_made_from_the_papers_scheduler_and_back():
    paper = FlowMatchEulerMaruyamaScheduler(drift_scale=0.87, diffusion_scale=0.91)
    swapped = FlowMatchSDEMultistepScheduler.from_config(paper.config)
    assert (swapped.config.drift_scale, swapped.config.diffusion_scale) == (0.87, 0.91)
    back = FlowMatchEulerMaruyamaScheduler.from_config(swapped.config)
    assert (back.config.drift_scale, back.config.diffusion_scale) == (0.87, 0.91)


def test_in_the_pipeline():
    pipe = tiny_pipeline(2)
    pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
    latents = pipe([0, 1], num_inference_steps=4, generator=seeded(), output_type="latent").images
    assert latents.isfinite().all()
    again = pipe([0, 1], num_inference_steps=4, generator=seeded(), output_type="latent").images
    assert torch.equal(latents, again)


def test_bad_order():
    with pytest.raises(ValueError, match="solver_order is 3; choose 1 or 2"):
        FlowMatchSDEMultistepScheduler(solver_order=3)
