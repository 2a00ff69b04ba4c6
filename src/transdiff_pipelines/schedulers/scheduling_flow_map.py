"""The sampler of flow maps: one model call for each interval of the time grid, however long it is."""

import torch
from diffusers.configuration_utils import register_to_config

from ..latents import renoise_latents
from .flow_match import FlowMatchScheduler


class FlowMapScheduler(FlowMatchScheduler):
    """Average velocity to the sample at the next time, x_r = x_t - (t - r) u, on a grid from 1 to 0.

    The model must have been told where a call goes: to `next_timesteps[i]` from `timesteps[i]`. A velocity takes the
    place of u only where the interval is short, as in Euler's method.

    Args:
        num_train_timesteps: timesteps run over [0, num_train_timesteps], timestep = num_train_timesteps * σ.
        renoise: how far a call goes beyond its σ of the grid, to (1 - renoise) σ, from where fresh noise leads back. 0
            follows the ODE; 1 goes to the data with every call, as consistency models are sampled.
        shift: timestep shift of the default grid, σ ← shift σ / (1 + (shift - 1) σ); 1 leaves it linear.
        flow_shift, prediction_type, use_flow_sigmas, lower_order_final: what multistep solvers have to know of this
            flow when they are made with `from_config`; not read here.

    Attributes:
        next_timesteps: where the model shall go from each of `timesteps`, on the same device.

    Raises:
        ValueError: a value out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        renoise: float = 0.0,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
        lower_order_final: bool = True,
    ):
        if not 0 <= renoise <= 1:
            raise ValueError(f"renoise is {renoise}; it must lie in [0, 1], and 0 adds no noise")
        self._initialize()

    def _default_grid(self, num_inference_steps: int) -> torch.Tensor:
        """linspace(1, 0, n + 1) without the 0."""
        return torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float32, device="cpu")[:-1]

    def _set_grid(self, sigmas: torch.Tensor, device: str | torch.device | None) -> None:
        super()._set_grid(sigmas, device)
        reached = (1 - self.config.renoise) * self.sigmas[1:]
        self.next_timesteps = (reached * self.config.num_train_timesteps).to(device, non_blocking=True)

    def _adds_noise(self) -> bool:
        return self.config.renoise > 0

    def _advance(
        self, velocity: torch.Tensor, x: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        reached = (1 - self.config.renoise) * sigma_next
        x = x - (sigma - reached) * velocity
        return x if noise is None else renoise_latents(x, noise, reached, sigma_next)
