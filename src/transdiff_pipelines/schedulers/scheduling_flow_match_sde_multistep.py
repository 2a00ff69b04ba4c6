"""Few-step sampling of the same SDE: its linear part is integrated exactly, x₀ extrapolated from step to step."""

import math

import torch
from diffusers.configuration_utils import register_to_config

from .flow_match_sde import FlowMatchSDEScheduler


class FlowMatchSDEMultistepScheduler(FlowMatchSDEScheduler):
    """A second-order exponential integrator of the SDE that `FlowMatchEulerMaruyamaScheduler` integrates.

    With the prediction x₀ = x - σ v held constant over a step, the reverse SDE is linear in x and has an exact
    solution: a step of any size keeps the path's marginals when both scales are 1. Second order comes at no extra
    model call from the prediction of the step before.

    Args:
        solver_order: 1 holds x₀ constant over a step; 2 extrapolates it to the middle of the step.
        num_train_timesteps, drift_scale, diffusion_scale, sigma_last, shift, flow_shift, prediction_type,
            use_flow_sigmas, lower_order_final: as in `FlowMatchEulerMaruyamaScheduler`.

    Raises:
        ValueError: a value out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        drift_scale: float = 1.0,
        diffusion_scale: float = 1.0,
        sigma_last: float = 0.04,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
        lower_order_final: bool = True,
        solver_order: int = 2,
    ):
        if solver_order not in (1, 2):
            raise ValueError(
                f"solver_order is {solver_order}; choose 1 or 2. Of another scheduler's config: from_config(config, "
                "solver_order=2)"
            )
        self._initialize()

    def _set_grid(self, sigmas: torch.Tensor, device: str | torch.device | None) -> None:
        super()._set_grid(sigmas, device)
        self._previous: tuple[float, torch.Tensor] | None = None

    def _advance(
        self, velocity: torch.Tensor, x: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        x0 = x - sigma * velocity
        if sigma_next == 0:
            self._previous = None
            return x0
        x0_over_step = self._extrapolate(x0, sigma, sigma_next)
        self._previous = (sigma, x0)

        # With a = drift_scale, e = 2a - 1 and L = log(s / t), the solution from t to s of
        #   dx = a [(2 - t) (x - x0) / t + x] dt + diffusion_scale sqrt(2 t) dW
        # is x_s = r x_t + (1 - r + a s phi(e)) x0 + diffusion_scale sqrt(-2 s^2 phi(2e)) z, with r = exp(2 a L) and
        # phi(k) = (exp(k L) - 1) / k. Written with phi it has no singularity at a = 1/2.
        a, log_ratio = self.config.drift_scale, math.log(sigma_next / sigma)
        e = 2 * a - 1
        decay = math.exp(2 * a * log_ratio)
        x = decay * x + (1 - decay + a * sigma_next * _phi(e, log_ratio)) * x0_over_step
        if noise is None:
            return x
        variance = -2 * sigma_next**2 * _phi(2 * e, log_ratio)
        return x + self.config.diffusion_scale * math.sqrt(variance) * noise

    def _extrapolate(self, x0: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        """x₀ in the middle of the step, on the scale of λ = log((1 - σ) / σ), in which it changes evenly.

        λ is infinite at σ = 1, so a run from pure noise extrapolates from its third call on.
        """
        if self.config.solver_order == 1 or self._previous is None or self._previous[0] >= 1:
            return x0
        sigma_previous, x0_previous = self._previous
        step = _log_snr(sigma_next) - _log_snr(sigma)
        step_before = _log_snr(sigma) - _log_snr(sigma_previous)
        return x0 + step / (2 * step_before) * (x0 - x0_previous)


def _phi(rate: float, log_ratio: float) -> float:
    """(exp(rate * log_ratio) - 1) / rate, which tends to log_ratio at rate 0."""
    return math.expm1(rate * log_ratio) / rate if rate else log_ratio


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
