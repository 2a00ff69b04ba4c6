"""The sampler of the paper: Euler-Maruyama on the reverse SDE of the linear path (Appendix F, Eq. 16-18)."""

import math

import torch
from diffusers.configuration_utils import register_to_config

from .flow_match_sde import FlowMatchSDEScheduler


class FlowMatchEulerMaruyamaScheduler(FlowMatchSDEScheduler):
    """Velocity to the next sample, along the reverse SDE of x_σ = (1 - σ) x₀ + σ ε with w(σ) = 2σ.

    The score of the linear path is s = -((1 - σ) v + x) / σ, so the drift v - ½ w s is (2 - σ) v + x, without a
    division at any σ. Both scales at 1 integrate the SDE itself; the published models use values a little below.
    `diffusion_scale=0` is deterministic but is not the probability-flow ODE: for that, swap in a flow-match ODE
    scheduler.

    Args:
        num_train_timesteps: timesteps run over [0, num_train_timesteps], timestep = num_train_timesteps * σ.
        drift_scale: factor on the drift of every step but the last.
        diffusion_scale: factor on the noise of every step but the last, which adds none.
        sigma_last: the last σ at which the model is called; from there one drift step goes to 0.
        shift: timestep shift of the default grid, σ ← shift σ / (1 + (shift - 1) σ); 1 leaves it linear.
        flow_shift, prediction_type, use_flow_sigmas, lower_order_final: what multistep solvers have to know of this
            flow when they are made with `from_config`; not read here.

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
    ):
        self._initialize()

    def _advance(
        self, velocity: torch.Tensor, x: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        dsigma = sigma_next - sigma
        # Eq. 18: dx = drift_scale * [(2 - sigma) v + x] dsigma + diffusion_scale * sqrt(2 sigma) dW
        drift = (2 - sigma) * velocity + x
        if sigma_next == 0:
            # The last step goes to the mean: it adds no noise, and neither scale enters it.
            return x + drift * dsigma
        x = x + self.config.drift_scale * drift * dsigma
        if noise is None:
            return x
        return x + self.config.diffusion_scale * math.sqrt(2 * sigma * -dsigma) * noise
