"""What the samplers of the reverse SDE share: its two scales and its time grid."""

import math

import torch

from .flow_match import FlowMatchScheduler


class FlowMatchSDEScheduler(FlowMatchScheduler):
    """Base of the schedulers that integrate the reverse SDE of the linear path, x_σ = (1 - σ) x₀ + σ ε, w(σ) = 2σ.

    A subclass says in `_advance` how one step is made. Its config has the entries of
    `FlowMatchEulerMaruyamaScheduler`, and its `__init__` ends with `self._initialize()`.
    """

    def _check_config(self) -> None:
        super()._check_config()
        config = self.config
        if not 0 < config.sigma_last <= 1:
            raise ValueError(f"sigma_last is {config.sigma_last}; it must lie in (0, 1], 0.04 in the published models")
        for name in ("drift_scale", "diffusion_scale"):
            if not (math.isfinite(config[name]) and config[name] >= 0):
                raise ValueError(f"{name} is {config[name]}; it must be a finite number of at least 0")

    def _default_grid(self, num_inference_steps: int) -> torch.Tensor:
        """linspace(1, sigma_last, n)."""
        return torch.linspace(1.0, self.config.sigma_last, num_inference_steps, dtype=torch.float32, device="cpu")

    def _adds_noise(self) -> bool:
        return self.config.diffusion_scale > 0
