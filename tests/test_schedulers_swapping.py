"""Other schedulers on this flow: nothing lost on the way there and back, right samples, refusals with a reason."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_scheduler import gaussian_velocity
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import FlowMapScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler
from transdiff_pipelines.pipelines.checks import FLOW_SCHEDULERS, check_scheduler


# Bounds on the RMSE to the exact ODE at 10 and 50 steps.
SOLVERS = {
    FlowMatchEulerDiscreteScheduler: (0.11, 0.022),
    FlowMatchHeunDiscreteScheduler: (0.003, 0.00015),
    DPMSolverMultistepScheduler: (0.01, 0.004),
    DPMSolverSinglestepScheduler: (0.05, 0.004),
    UniPCMultistepScheduler: (0.015, 0.002),
}


def public_config(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def sample(scheduler, noise, steps, seed=0):
    """Samples of N(2, 0.5²) with its exact velocity, and the number of velocities asked for."""
    velocity, generator, x = gaussian_velocity(2.0, 0.5), seeded(seed), noise
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        # The multistep solvers round their timesteps; this is about the solver, so it gets the exact σ.
        x = scheduler.step(velocity(x, sigma.item()), timestep, x, **kwargs).prev_sample
    return x, len(scheduler.timesteps)


class TestSwapping:
    @pytest.mark.parametrize("reloaded", [False, True])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_there_and_back_nothing_is_lost_or_logged(self, solver, reloaded, tmp_path, caplog):
        pipe = tiny_pipeline(scheduler=FlowMatchEulerMaruyamaScheduler(drift_scale=0.87, diffusion_scale=0.91))
        if reloaded:
            pipe.scheduler.save_pretrained(tmp_path)
            pipe.scheduler = FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path)
        original = public_config(pipe.scheduler)
        pipe.scheduler = solver.from_config(pipe.scheduler.config)
        assert pipe(0, num_inference_steps=4, generator=seeded(), output_type="latent").images.isfinite().all()
        pipe.scheduler = FlowMatchEulerMaruyamaScheduler.from_config(pipe.scheduler.config)
        assert public_config(pipe.scheduler).items() >= original.items()
        assert not caplog.records

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_pipeline_saved_with_another_scheduler_can_go_back(self, solver, tmp_path):
        pipe = tiny_pipeline(scheduler=FlowMatchEulerMaruyamaScheduler(drift_scale=0.87, diffusion_scale=0.91))
        original = public_config(pipe.scheduler)
        pipe.scheduler = solver.from_config(pipe.scheduler.config)
        expected = pipe(0, num_inference_steps=4, generator=seeded(), output_type="latent").images
        pipe.save_pretrained(tmp_path)
        pipe = type(pipe).from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.scheduler) is solver
        assert torch.equal(pipe(0, num_inference_steps=4, generator=seeded(), output_type="latent").images, expected)
        back = FlowMatchEulerMaruyamaScheduler.from_config(pipe.scheduler.config)
        assert public_config(back).items() >= original.items()

    def test_a_shift_goes_along(self):
        scheduler = FlowMatchEulerMaruyamaScheduler(shift=3.0, flow_shift=3.0)
        assert FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).shift == 3.0
        assert DPMSolverMultistepScheduler.from_config(scheduler.config).config.flow_shift == 3.0

    @pytest.mark.parametrize("name", ["shift", "flow_shift"])
    def test_a_shift_given_by_either_name_goes_along_and_back(self, name):
        scheduler = FlowMatchEulerMaruyamaScheduler(**{name: 3.0})
        scheduler.set_timesteps(3)
        assert scheduler.sigmas[1].item() == pytest.approx(3 * 0.52 / (1 + 2 * 0.52))
        assert FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).shift == 3.0
        assert DPMSolverMultistepScheduler.from_config(scheduler.config).config.flow_shift == 3.0
        shifted = UniPCMultistepScheduler.from_config(FlowMatchEulerMaruyamaScheduler().config, flow_shift=2.0)
        assert FlowMatchEulerMaruyamaScheduler.from_config(shifted.config).config.shift == 2.0

    @pytest.mark.parametrize("through", [None, UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
    @pytest.mark.parametrize("reloaded", [False, True])
    @pytest.mark.parametrize(
        ("cls", "changed"),
        [
            (FlowMatchEulerMaruyamaScheduler, {"drift_scale": 0.8}),
            (FlowMatchEulerMaruyamaScheduler, {"diffusion_scale": 0.0, "sigma_last": 0.1}),
            (FlowMatchSDEMultistepScheduler, {"solver_order": 1, "drift_scale": 0.8}),
        ],
    )
    def test_a_value_changed_in_a_copy_of_the_config_counts(self, cls, changed, reloaded, through, tmp_path):
        """diffusers drops what a config lists as left at its default, even where it was changed since."""
        scheduler = cls()
        if reloaded:
            scheduler.save_pretrained(tmp_path)
            scheduler = cls.from_pretrained(tmp_path)
        if through is not None:
            scheduler = through.from_config(scheduler.config)
        config = cls.from_config({**scheduler.config, **changed}).config
        assert {name: config[name] for name in changed} == changed
        if through is not None:
            config = cls.from_config(through.from_config({**cls().config, **changed}).config).config
            assert {name: config[name] for name in changed} == changed

    def test_values_changed_back_to_the_default_count(self):
        scheduler = FlowMatchEulerMaruyamaScheduler(drift_scale=0.8, shift=2.0)
        config = FlowMatchEulerMaruyamaScheduler.from_config({**scheduler.config, "drift_scale": 1.0}).config
        assert (config.drift_scale, config.shift, config.flow_shift) == (1.0, 2.0, 2.0)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_diffusers_schedulers_see_a_changed_value(self, solver):
        config = {**FlowMatchEulerMaruyamaScheduler().config, "num_train_timesteps": 500}
        assert solver.from_config(config).config.num_train_timesteps == 500

    def test_a_value_changed_in_the_config_of_a_diffusers_scheduler_counts(self):
        config = {**UniPCMultistepScheduler().config, "solver_order": 1, "num_train_timesteps": 500}
        scheduler = FlowMatchSDEMultistepScheduler.from_config(config)
        assert (scheduler.config.solver_order, scheduler.config.num_train_timesteps) == (1, 500)
        # A default of theirs is none of ours: this one would be refused.
        assert scheduler.config.prediction_type == "flow_prediction"

    @pytest.mark.parametrize("name", ["shift", "flow_shift"])
    @pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (2.0, 3.0), (2.0, 1.0)])
    @pytest.mark.parametrize("reloaded", [False, True])
    def test_a_changed_shift_is_the_shift(self, name, before, after, reloaded, tmp_path):
        """It has two names, and the other one still has the old value."""
        scheduler = FlowMatchEulerMaruyamaScheduler(shift=before)
        if reloaded:
            scheduler.save_pretrained(tmp_path)
            scheduler = FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path)
        for changed in (
            FlowMatchSDEMultistepScheduler.from_config({**scheduler.config, name: after}),
            FlowMatchSDEMultistepScheduler.from_config(scheduler.config, **{name: after}),
        ):
            assert (changed.config.shift, changed.config.flow_shift) == (after, after)
            assert UniPCMultistepScheduler.from_config(changed.config).config.flow_shift == after
        there = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=after)
        assert FlowMatchEulerMaruyamaScheduler.from_config(there.config).config.flow_shift == after

    def test_two_shifts_are_refused(self):
        with pytest.raises(ValueError, match=r"shift is 3.0 and flow_shift 2.0, but they are two names of one value"):
            FlowMatchEulerMaruyamaScheduler(shift=3.0, flow_shift=2.0)

    def test_compatibles_are_what_works(self):
        compatibles = FlowMatchEulerMaruyamaScheduler().compatibles
        assert set(SOLVERS) < set(compatibles)
        for cls in compatibles:
            check_scheduler(cls.from_config(FlowMatchEulerMaruyamaScheduler().config))


class TestKnownSolution:
    """Of the flow to Gaussian data: the probability-flow ODE maps noise ε to mean + std ε."""

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_ordinary_differential_equation(self, solver):
        scheduler = solver.from_config(FlowMatchEulerMaruyamaScheduler().config)
        noise = torch.randn(1000, 1, 1, 1, generator=seeded())
        for steps, bound in zip((10, 50), SOLVERS[solver], strict=True):
            x, calls = sample(scheduler, noise, steps)
            assert (x - (2.0 + 0.5 * noise)).square().mean().sqrt() < bound
            assert calls == (2 * steps - 1 if solver is FlowMatchHeunDiscreteScheduler else steps)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("LTXEulerAncestralRFScheduler", {}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})],
    )
    def test_stochastic(self, name, options):
        scheduler = getattr(diffusers, name).from_config(FlowMatchEulerMaruyamaScheduler().config, **options)
        check_scheduler(scheduler)
        x, _ = sample(scheduler, torch.randn(50_000, 1, 1, 1, generator=seeded()), 200)
        assert abs(x.mean().item() - 2.0) < 0.01
        assert abs(x.std().item() - 0.5) < 0.02

    def test_karras_spacing_works_where_it_is_not_refused(self):
        scheduler = UniPCMultistepScheduler.from_config(
            FlowMatchEulerMaruyamaScheduler().config, use_karras_sigmas=True
        )
        check_scheduler(scheduler)
        noise = torch.randn(1000, 1, 1, 1, generator=seeded())
        x, _ = sample(scheduler, noise, 50)
        assert (x - (2.0 + 0.5 * noise)).square().mean().sqrt() < 0.01


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("DEISMultistepScheduler", {}, "stops before sigma 0"),
            ("SASolverScheduler", {}, "stops before sigma 0"),
            ("FlowMatchLCMScheduler", {}, "noises the predicted image anew"),
            ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "noises the predicted image anew"),
            ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "from the image to the noise"),
            ("DPMSolverMultistepInverseScheduler", {}, "from the image to the noise"),
            ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "gives NaN"),
            ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "gives NaN"),
            ("DPMSolverSinglestepScheduler", {"use_exponential_sigmas": True}, "gives NaN"),
            ("UniPCMultistepScheduler", {"use_beta_sigmas": True}, "gives NaN"),
            ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "gives NaN"),
            ("UniPCMultistepScheduler", {"lower_order_final": False}, "gives NaN"),
            ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "wants a shift for each resolution"),
            ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 500}, "timestep is 1000 times sigma"),
            ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "stops before sigma 0"),
            ("DPMSolverMultistepScheduler", {"thresholding": True}, "clips latents"),
            ("DPMSolverMultistepScheduler", {"use_flow_sigmas": False}, "trained on the linear path"),
            ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}, "the transformer predicts flow"),
            ("EulerDiscreteScheduler", {}, "does not integrate a flow"),
            ("DDIMScheduler", {}, "does not integrate a flow"),
            ("IPNDMScheduler", {}, "does not integrate a flow"),
        ],
    )
    def test_reason(self, name, options, reason):
        pipe = tiny_pipeline()
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        with pytest.raises(ValueError, match=f"{name} .*{reason}"):
            pipe(0)

    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("DEISMultistepScheduler", {}),
            ("FlowMatchLCMScheduler", {}),
            ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
            ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
            ("DPMSolverMultistepScheduler", {"thresholding": True}),
            ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
            ("UniPCMultistepScheduler", {"lower_order_final": False}),
            ("SASolverScheduler", {}),
        ],
    )
    def test_what_is_refused_is_wrong_indeed(self, name, options):
        scheduler = getattr(diffusers, name).from_config(FlowMatchEulerMaruyamaScheduler().config, **options)
        x, _ = sample(scheduler, torch.randn(20_000, 1, 1, 1, generator=seeded()), 50)
        error = max(abs(x.mean().item() - 2.0), abs(x.std().item() - 0.5))
        assert not error < 0.03

    def test_a_scheduler_from_elsewhere_is_believed(self):
        class OwnScheduler(FlowMatchEulerDiscreteScheduler):
            pass

        check_scheduler(OwnScheduler())
        assert "OwnScheduler" not in FLOW_SCHEDULERS


class TestTimeGrid:
    @pytest.mark.parametrize(
        "solver", [FlowMatchEulerMaruyamaScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler]
    )
    def test_custom_grid(self, solver, caplog):
        pipe = tiny_pipeline()
        pipe.scheduler = solver.from_config(pipe.scheduler.config)
        seen = []

        def record(pipe, step, timestep, tensors):
            seen.append(float(timestep))

        arguments = {"generator": None, "output_type": "latent", "callback_on_step_end": record}
        by_sigmas = pipe(0, sigmas=[0.999, 0.5, 0.125], **{**arguments, "generator": seeded()}).images
        np.testing.assert_allclose(seen[:3], [999.0, 500.0, 125.0], atol=1)
        assert len(seen) == 3 * pipe.condition_encoder.num_images
        by_timesteps = pipe(0, timesteps=[999, 500, 125], **{**arguments, "generator": seeded()}).images
        assert torch.equal(by_sigmas, by_timesteps)
        assert not caplog.records

    @pytest.mark.parametrize("grid", [[], [0.5, 0.5], [0.1, 0.7], [1.5, 0.5], [0.5, 0.0], [0.5, float("nan")]])
    def test_bad_grid(self, grid):
        with pytest.raises(ValueError, match="sigmas are .* strictly decreasing"):
            tiny_pipeline()(0, sigmas=grid)
        with pytest.raises(ValueError, match="timesteps are .* strictly decreasing"):
            tiny_pipeline()(0, timesteps=[1000 * value for value in grid])

    def test_one_grid_only(self):
        with pytest.raises(ValueError, match="pass one of them"):
            tiny_pipeline()(0, sigmas=[1.0], timesteps=[1000.0])

    @pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler"])
    def test_a_solver_without_custom_grids(self, name):
        pipe = tiny_pipeline()
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=f"{name} takes no custom sigmas"):
            pipe(0, timesteps=[1000, 500])


class TestConfigs:
    OWN = [FlowMapScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler]

    @pytest.mark.parametrize("cls", OWN)
    def test_there_and_back_the_config_is_the_same(self, cls):
        """What diffusers' SchedulerCommonTest.test_compatibles compares, private entries as well."""
        scheduler = cls(shift=2.0)
        for other in scheduler.compatibles:
            back = cls.from_config(other.from_config(scheduler.config).config)
            assert {name: back.config.get(name) for name in scheduler.config} == dict(scheduler.config)

    @pytest.mark.parametrize("cls", OWN)
    def test_a_keyword_that_nothing_reads_is_said(self, cls, caplog):
        cls.from_config(cls().config, drift_scal=0.5)
        assert "has no drift_scal, so that it changes nothing" in caplog.text

    def test_a_number_as_text(self):
        with pytest.raises(TypeError, match="drift_scale is '0.5', a str; expected a number"):
            FlowMatchEulerMaruyamaScheduler(drift_scale="0.5")
