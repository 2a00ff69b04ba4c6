"""diffusers' scheduler contract on this package's schedulers."""

from tests.schedulers.test_schedulers import SchedulerCommonTest

from transdiff_pipelines import FlowMapScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler


class EulerMaruyamaTests(SchedulerCommonTest):
    scheduler_classes = (FlowMatchEulerMaruyamaScheduler,)
    forward_default_kwargs = (("num_inference_steps", 25),)
    test_trained_betas = None  # a flow has no betas

    def get_scheduler_config(self, **kwargs) -> dict:
        return {"num_train_timesteps": 1000, "drift_scale": 0.87, "diffusion_scale": 0.91, **kwargs}


class SDEMultistepTests(EulerMaruyamaTests):
    scheduler_classes = (FlowMatchSDEMultistepScheduler,)


class FlowMapTests(EulerMaruyamaTests):
    scheduler_classes = (FlowMapScheduler,)

    def get_scheduler_config(self, **kwargs) -> dict:
        return {"num_train_timesteps": 1000, "renoise": 0.5, **kwargs}


del SchedulerCommonTest  # the empty contract itself is no test
