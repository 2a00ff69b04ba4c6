"""What the samplers of this package share: the place on a time grid, and diffusers' scheduler surface."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging

from ..latents import draw_noise, noise_latents


logger = logging.get_logger(__name__)

# Two names of one thing: flow-match schedulers read `shift`, multistep ones `flow_shift`.
_SHIFT_NAMES = ("shift", "flow_shift")


class FlowMatchScheduler(SchedulerMixin, ConfigMixin, ABC):
    """Base of the schedulers for the linear path x_σ = (1 - σ) x₀ + σ ε.

    A subclass says in `_default_grid` where the model is called, in `_adds_noise` whether steps draw noise and in
    `_advance` how one is made. Its config has the entries num_train_timesteps, shift, flow_shift and prediction_type,
    and its `__init__` ends with `self._initialize()`.
    """

    _compatibles = [
        "FlowMapScheduler",
        "FlowMatchEulerMaruyamaScheduler",
        "FlowMatchSDEMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @abstractmethod
    def _default_grid(self, num_inference_steps: int) -> torch.Tensor:
        """The σ of n model calls, `(n,)` from 1 downwards, before the shift."""

    @abstractmethod
    def _adds_noise(self) -> bool:
        """Whether steps to a σ above 0 add noise; the last step never does."""

    @abstractmethod
    def _advance(
        self, velocity: torch.Tensor, x: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """x at `sigma_next` from velocity and x at `sigma`; `noise` is None where the step adds none."""

    def _check_config(self) -> None:
        """Raise TypeError for an entry that is no number and should be one."""
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = self.config.get(name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if type(parameter.default) in (int, float) and not is_number:
                raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a number")

    def _initialize(self) -> None:
        """Check the config, have it handed on whole by `from_config`, and stand at the start of the training grid."""
        self._check_config()
        config = self.config
        if not config.shift > 0:
            raise ValueError(f"shift is {config.shift}; it must be positive, and is 1 in the published models")
        if config.prediction_type != "flow_prediction":
            raise ValueError(
                f"prediction_type is {config.prediction_type!r}; this scheduler integrates 'flow_prediction' "
                "(velocity) only"
            )
        if config.shift != config.flow_shift:
            if 1 not in (config.shift, config.flow_shift):
                raise ValueError(
                    f"shift is {config.shift} and flow_shift {config.flow_shift}, but they are two names of one "
                    "value; give one of them"
                )
            shift = config.flow_shift if config.shift == 1 else config.shift
            self.register_to_config(shift=shift, flow_shift=shift)
        # `from_config` drops the entries that a config lists as left at their default. Here none may be dropped:
        # without `prediction_type`, DPM-Solver would run as noise prediction and return garbage, and a value that
        # somebody puts into a copy of this config would be dropped with the default it replaces.
        # The class name, which a saved config has, tells other schedulers' `from_config` whose entries these are.
        self.register_to_config(_use_default_values=[], _class_name=type(self).__name__)
        # Which of the two names somebody changes in a copy of this config is seen from the value both had.
        if self.config.shift != 1:
            self.register_to_config(_shift=self.config.shift)

        self._step_index: int | None = None
        self._begin_index: int | None = None
        # Before set_timesteps, the training grid: whole timesteps from num_train_timesteps down to 1.
        steps = config.num_train_timesteps
        self._set_grid(torch.linspace(1.0, 1.0 / steps, steps, device="cpu"), device=None)
        self.num_inference_steps: int | None = None

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What `from_config` hands to `__init__`: with the entries that somebody changed in a copy of a config.

        diffusers drops every entry that the config lists as left at its default, also one that was changed since.
        """
        known = set(inspect.signature(cls.__init__).parameters) | set(config_dict) | set(_SHIFT_NAMES)
        if strange := sorted(kwargs.keys() - known):
            logger.warning(f"{cls.__name__} has no {' and no '.join(strange)}, so that it changes nothing here")
        defaults = _defaults(config_dict.get("_class_name"), [cls, *cls._get_compatibles()])
        unset = [
            name
            for name in config_dict.get("_use_default_values", [])
            if name not in config_dict or config_dict[name] in defaults.get(name, ())
        ]
        config_dict = {**config_dict, "_use_default_values": unset}
        return super().extract_init_dict(_with_one_shift(config_dict, kwargs), **kwargs)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise."""
        return 1.0

    @property
    def step_index(self) -> int | None:
        """Index of the coming step; None until the first `step` after `set_timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Name the first step, so that `step` need not look its timestep up (which would wait for the device)."""
        self._begin_index = begin_index

    def _set_grid(self, sigmas: torch.Tensor, device: str | torch.device | None) -> None:
        # sigmas stay on the CPU: as 0-dim CPU tensors they meet samples of any device without a synchronisation.
        self.sigmas = torch.cat([sigmas.cpu(), torch.zeros(1, device="cpu")])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device, non_blocking=True)
        self._step_index = self._begin_index = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Set the scheduler's own grid of n σ, shifted by `shift`, then 0; or the given `sigmas`, then 0.

        Args:
            num_inference_steps: n, the number of model calls.
            device: where `timesteps` shall live.
            sigmas: strictly decreasing values in (0, 1], used as they are.

        Raises:
            ValueError: fewer than one step, or `sigmas` that do not decrease within (0, 1].
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed")
            grid = self._default_grid(num_inference_steps)
            shift = self.config.shift
            grid = shift * grid / (1 + (shift - 1) * grid) if shift != 1 else grid
        else:
            grid = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu")
            if grid.ndim != 1 or len(grid) == 0 or grid[0] > 1 or grid[-1] <= 0 or bool((grid.diff() >= 0).any()):
                raise ValueError(f"sigmas are {sigmas}; expected strictly decreasing values in (0, 1], without the 0")
            if num_inference_steps is not None and num_inference_steps != len(grid):
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps} but {len(grid)} sigmas were given; pass one of them"
                )
        self.num_inference_steps = len(grid)
        self._set_grid(grid, device)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The model takes the sample as it is."""
        return sample

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Position of `timestep` in the grid.

        Raises:
            ValueError: the timestep is not in the grid.
        """
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a step has one for the whole batch")
        distance = (self.timesteps - timestep).abs()
        index = int(distance.argmin())
        # float32 keeps about 7 digits: a timestep that went through another dtype or device is still found.
        if distance[index] > 1e-5 * self.config.num_train_timesteps:
            raise ValueError(
                f"timestep {float(timestep)} is not on the grid; pass the values of scheduler.timesteps, "
                "which set_timesteps makes"
            )
        return index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step, from the σ of `timestep` to the next one of the grid. The last step, to 0, adds no noise.

        Args:
            model_output: velocity at (`sample`, `timestep`), any shape.
            timestep: a value of `timesteps`; only the first of a run is looked up, and not even that one after
                `set_begin_index`.
            sample: x_σ, of the same shape; the result has its dtype, the arithmetic is at least float32.
            generator: source of the step's noise, one or a list with one for each sample.
            variance_noise: the step's standard normal noise, given instead of drawn.

        Raises:
            ValueError: the timestep is not on the grid, or the run has already reached σ = 0.
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError("the run has reached sigma 0; call set_timesteps before another one")
        sigma, sigma_next = self.sigmas[self._step_index : self._step_index + 2].tolist()
        dtype = torch.promote_types(sample.dtype, torch.float32)

        noise = None
        if sigma_next > 0 and self._adds_noise():
            noise = variance_noise
            if noise is None:
                noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
            noise = noise.to(sample.device, dtype)
        prev_sample = self._advance(model_output.to(dtype), sample.to(dtype), sigma, sigma_next, noise)

        self._step_index += 1
        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise clean samples to `timestep`, (1 - σ) x₀ + σ ε (Eq. 4); one timestep, or one for each sample `(B,)`."""
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32)
        sigma = (timestep / self.config.num_train_timesteps).reshape(-1, *[1] * (sample.ndim - 1))
        return noise_latents(sample, noise, sigma).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """`scale_noise` under the name and with the argument order of diffusers' other schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _defaults(class_name: str | None, classes: Sequence[type]) -> dict[str, list[Any]]:
    """The defaults of each argument of the schedulers in `classes`, or of the one that is called `class_name`."""
    named = [cls for cls in classes if cls.__name__ == class_name]
    defaults: dict[str, list[Any]] = {}
    for cls in named or classes:
        for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
            defaults.setdefault(name, []).append(parameter.default)
    return defaults


def _with_one_shift(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The config with `shift` and `flow_shift` at the value of the one that was set last.

    That is the one given as a keyword; or else the one that the config's scheduler reads; or else, in a config of one
    of ours, the one that is not what both were.
    """
    named = [name for name in _SHIFT_NAMES if name in given]
    if not named:
        original = getattr(diffusers, str(config.get("_class_name")), None)
        read = set(inspect.signature(original.__init__).parameters) if original else set()
        named = [name for name in _SHIFT_NAMES if name in read and name in config]
        if len(named) == 2:
            named = [name for name in _SHIFT_NAMES if config[name] != config.get("_shift", 1)]
    if not named:
        return config
    shift = {**config, **given}[named[0]]
    return {**config, **dict.fromkeys(_SHIFT_NAMES, shift), "_shift": shift}
