"""Schedulers on flows whose solution is known: how their error falls with the number of model calls.

Gaussian data N(m, s²): the exact velocity is linear, so every scheduler here is an affine map of its noise, and its
error comes out exactly, without sampling. A mixture of three Gaussians: the exact velocity is not linear; samples are
drawn and compared by Wasserstein-1 distance.

Shapes: N samples.
"""

import inspect
import math
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin


# Velocity at samples of any shape and sigma.
Velocity = Callable[[torch.Tensor, float], torch.Tensor]

MEAN, STD = 2.0, 0.5
MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_STDS = (0.3, 0.5, 0.2), (-2.0, 0.5, 2.5), (0.3, 0.2, 0.4)


def mixture_velocity(weights: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> Velocity:
    """The exact velocity E[ε - x₀ | x_σ = x] of data drawn from a one-dimensional mixture of Gaussians."""

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        variances = (1 - sigma) ** 2 * stds**2 + sigma**2
        residuals = x.unsqueeze(-1) - (1 - sigma) * means
        log_shares = weights.log() - residuals**2 / (2 * variances) - variances.log() / 2
        shares = torch.softmax(log_shares, dim=-1)
        # Within a component, x, ε and x₀ are jointly normal.
        per_component = (sigma - (1 - sigma) * stds**2) / variances * residuals - means
        return (shares * per_component).sum(dim=-1)

    return velocity


def gaussian_velocity() -> Velocity:
    """The exact velocity of N(MEAN, STD²)."""
    return mixture_velocity(*(torch.tensor([value], dtype=torch.float64) for value in (1.0, MEAN, STD)))


def model_calls(scheduler: SchedulerMixin, steps: int) -> int:
    """Model calls of a run with `steps` steps: more than those for a solver that calls twice a step."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def integrate(
    scheduler: SchedulerMixin, velocity: Velocity, noise: torch.Tensor, draw: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples from `noise` `(N, 1)` on the grid that was set; `draw` gives a step's noise `(N, 1)`.

    Returns the samples at the grid's last sigma above 0, and those at 0.
    """
    scheduler.set_begin_index(0)
    takes_noise = "variance_noise" in inspect.signature(scheduler.step).parameters
    x = at_last_sigma = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        at_last_sigma = x
        noise_arguments = {"variance_noise": draw()} if takes_noise else {}
        # The velocity is taken at the exact sigma, because some multistep solvers round their timesteps, and the
        # error of the solver alone is what is asked for.
        x = scheduler.step(velocity(x, sigma.item()), timestep, x, **noise_arguments, return_dict=False)[0]
    return at_last_sigma, x


def gaussian_errors(scheduler: SchedulerMixin, steps: int) -> tuple[float, float]:
    """Wasserstein-2 distances of the sampled distributions to the exact ones: at the last sigma above 0, and at 0.

    The first is the error of the integration, the second includes the step to 0, whose size the grid decides. Both
    are exact: the sampled x is affine in the independent normal draws. Element 0 of the batch runs without any noise
    and gives the mean; element j runs with draw j - 1 at one and gives, less the mean, that draw's coefficient.
    """
    calls = model_calls(scheduler, steps)
    units = torch.eye(calls + 2, dtype=torch.float64).unsqueeze(-1)
    draws = iter(units[2:])
    ends = integrate(scheduler, gaussian_velocity(), units[1].clone(), lambda: next(draws))
    sigmas = scheduler.sigmas[calls - 1].item(), 0.0
    errors = [_gaussian_distance(x.squeeze(-1), sigma) for x, sigma in zip(ends, sigmas, strict=True)]
    return errors[0], errors[1]


def _gaussian_distance(x: torch.Tensor, sigma: float) -> float:
    mean, std = x[0].item(), (x[1:] - x[0]).square().sum().sqrt().item()
    exact_std = math.hypot((1 - sigma) * STD, sigma)
    return math.hypot(mean - (1 - sigma) * MEAN, std - exact_std)


def sample_mixture(count: int, generator: torch.Generator) -> torch.Tensor:
    """Data `(N,)` of the mixture, in float64."""
    weights, means, stds = (
        torch.tensor(values, dtype=torch.float64) for values in (MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_STDS)
    )
    component = torch.multinomial(weights, count, replacement=True, generator=generator)
    return means[component] + stds[component] * torch.randn(count, generator=generator, dtype=torch.float64)


def wasserstein_1(samples: torch.Tensor, data: torch.Tensor) -> float:
    """Wasserstein-1 distance of two sets of the same size `(N,)`: the mean distance of their sorted elements."""
    return (samples.sort().values - data.sort().values).abs().mean().item()


def mixture_error(scheduler: SchedulerMixin, steps: int, count: int, seed: int = 0) -> float:
    """Wasserstein-1 distance of `count` samples to as many data of the mixture; two sets of data are apart too."""
    generator = torch.Generator().manual_seed(seed)
    data = sample_mixture(count, generator)
    parameters = (torch.tensor(v, dtype=torch.float64) for v in (MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_STDS))

    def draw() -> torch.Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    model_calls(scheduler, steps)
    _, samples = integrate(scheduler, mixture_velocity(*parameters), draw(), draw)
    return wasserstein_1(samples.squeeze(-1), data)


def fitted_order(calls: list[int], errors: list[float]) -> float:
    """The order p of errors ~ calls^-p: the slope in the log-log plot, with its sign turned."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (calls, errors))
    x, y = x - x.mean(), y - y.mean()
    return -((x * y).sum() / (x * x).sum()).item()
