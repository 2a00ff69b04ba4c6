"""The samplers that are compared at few steps: each a scheduler made from the model's own, by name."""

from dataclasses import dataclass

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from transdiff_pipelines import FlowMapScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler


@dataclass(frozen=True)
class Sampler:
    """A scheduler class with settings; `make` takes the config of the model's scheduler for the rest."""

    name: str
    scheduler: type[SchedulerMixin]
    settings: tuple[tuple[str, float | int | str], ...] = ()
    calls_per_step: int = 1

    def make(self, config: dict) -> SchedulerMixin:
        """The scheduler, for the flow that `config` describes."""
        return self.scheduler.from_config(config, **dict(self.settings))

    def steps_within(self, calls: int) -> int:
        """The most steps that ask for at most `calls` model calls; the last step asks for one in any case."""
        return (calls + self.calls_per_step - 1) // self.calls_per_step


def on_grid(scheduler: type[SchedulerMixin], name: str, **settings: float) -> Sampler:
    """A sampler with its settings in its name."""
    described = ", ".join(f"{key} {value:g}" for key, value in settings.items())
    return Sampler(f"{name}, {described}" if described else name, scheduler, tuple(settings.items()))


EULER_MARUYAMA = Sampler("Euler-Maruyama", FlowMatchEulerMaruyamaScheduler)
SDE_1 = Sampler("SDE multistep, order 1", FlowMatchSDEMultistepScheduler, (("solver_order", 1),))
SDE_2 = Sampler("SDE multistep, order 2", FlowMatchSDEMultistepScheduler, (("solver_order", 2),))
SDE_2_FEW_STEPS = on_grid(FlowMatchSDEMultistepScheduler, "SDE multistep, order 2", shift=2.0, sigma_last=0.12)
EULER_ODE = Sampler("Euler (ODE)", FlowMatchEulerDiscreteScheduler)
HEUN_ODE = Sampler("Heun (ODE)", FlowMatchHeunDiscreteScheduler, calls_per_step=2)
DPM_2M = Sampler("DPM-Solver++ 2M (ODE)", DPMSolverMultistepScheduler)
UNIPC = Sampler("UniPC (ODE)", UniPCMultistepScheduler)

FIXED_GRID = (EULER_MARUYAMA, SDE_1, SDE_2, SDE_2_FEW_STEPS, EULER_ODE, HEUN_ODE, DPM_2M, UNIPC)

FLOW_MAPS = (on_grid(FlowMapScheduler, "flow map"), on_grid(FlowMapScheduler, "flow map", renoise=0.2))


def time_grids() -> list[Sampler]:
    """The second-order SDE sampler on other time grids: more steps near the noise (shift), another last step."""
    grids: list[dict[str, float]] = [
        {"shift": shift, "sigma_last": last} for last in (0.02, 0.04, 0.08, 0.12, 0.16) for shift in (1.0, 1.5, 2.0)
    ]
    return [on_grid(FlowMatchSDEMultistepScheduler, "SDE multistep, order 2", **grid) for grid in grids]
