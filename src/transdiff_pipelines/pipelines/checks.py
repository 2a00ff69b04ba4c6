"""What fits together: checks of components and arguments, all made before any heavy work."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..latents import NUM_TRAIN_TIMESTEPS
from ..models import ARConditionEncoder, TransDiffTransformer2DModel
from .vae import check_vae, describe


_MULTISTEP_SCHEDULERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")

FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    *_MULTISTEP_SCHEDULERS,
    "LTXEulerAncestralRFScheduler",
)
"""Schedulers of diffusers that sample a flow of known solution rightly (tests/test_schedulers_swapping.py)."""

_OWN_SCHEDULERS = ("FlowMatchEulerMaruyamaScheduler", "FlowMatchSDEMultistepScheduler")

_UNFIT_SCHEDULERS = {
    "DEISMultistepScheduler": "it stops before sigma 0 and leaves noise in the image",
    "SASolverScheduler": "it stops before sigma 0 and leaves noise in the image",
    "DPMSolverMultistepInverseScheduler": "it goes from the image to the noise",
    "FlowMatchLCMScheduler": "it noises the predicted image anew at every step, which only a distilled model allows",
}

# Options of schedulers that fit: the value with which they do not fit, and why.
_UNFIT_OPTIONS = {
    "stochastic_sampling": (True, "it noises the predicted image anew at every step, as if the model were distilled"),
    "invert_sigmas": (True, "it goes from the image to the noise"),
    "thresholding": (True, "it clips latents as if they were pixels"),
    "final_sigmas_type": ("sigma_min", "it stops before sigma 0 and leaves noise in the image"),
    "use_dynamic_shifting": (True, "it wants a shift for each resolution, and the model knows one resolution"),
}

# The same for options that only one of the schedulers cannot have.
_UNFIT_OPTIONS_OF = {
    "UniPCMultistepScheduler": {
        "solver_type": ("bh1", "it gives NaN on this flow"),
        "lower_order_final": (False, "it gives NaN on this flow"),
    }
}

# These leave their sigmas on the device and compare them at every step, which waits for a GPU, so that the sigmas are
# brought to the CPU.
SCHEDULERS_READING_SIGMAS = ("FlowMatchHeunDiscreteScheduler",)

# These schedulers want the 0 at the end of custom sigmas, which the others append themselves.
_OWN_FORM_OF_SIGMAS = ("LTXEulerAncestralRFScheduler",)

_NOISE_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclass(frozen=True)
class CallSettings:
    """The arguments of a call, checked, and with what was left to the checkpoint filled in.

    Attributes:
        label_ids: class ids as given; None where `condition_embeds` take the place of labels.
        num_images_per_label: images of each label, next to one another.
        guidance_scales: one for each image of the AR sequence; as many as are made, references counted.
        num_inference_steps: denoising steps for each image of the sequence.
        sigmas: the caller's time grid, if any.
        tensor_inputs: what the callback is given.

    The others are those of `TransDiffPipeline.__call__`.
    """

    label_ids: tuple[int, ...] | None
    num_images_per_label: int
    guidance_scales: tuple[float, ...]
    guidance_interval: tuple[float, float] | None
    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    output_type: str
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None
    tensor_inputs: tuple[str, ...]
    attention_kwargs: dict[str, Any] | None

    @property
    def guided(self) -> bool:
        """Whether an image of the sequence needs the unconditional branch."""
        return any(scale != 1.0 for scale in self.guidance_scales)

    @property
    def denoising(self) -> dict[str, Any]:
        """The arguments of `TransDiffPipeline.denoise` that are the same for all images of the sequence."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "sigmas": self.sigmas,
            "guidance_interval": self.guidance_interval,
            "generator": self.generator,
        }


def check_components(
    encoder: ARConditionEncoder | None, transformer: TransDiffTransformer2DModel | None, vae: Any
) -> None:
    """Raise ValueError where the configs of the components that are present do not agree, TypeError for a class."""
    for name, component in (("condition_encoder", encoder), ("transformer", transformer)):
        if component is not None and not isinstance(component, torch.nn.Module):
            raise TypeError(f"{name} is {describe(component)}; expected a model")
    if encoder is not None and transformer is not None:
        width = encoder.config.num_attention_heads * encoder.config.attention_head_dim
        if width != transformer.config.cross_attention_dim:
            raise ValueError(
                f"the condition encoder is {width} wide but the transformer's cross_attention_dim is "
                f"{transformer.config.cross_attention_dim}; they belong to different models"
            )
        if encoder.config.in_channels != transformer.config.in_channels:
            raise ValueError(
                f"the condition encoder takes {encoder.config.in_channels} latent channels, the transformer "
                f"{transformer.config.in_channels}; they belong to different models"
            )
        # A 1-step encoder reads no image, so its size does not matter: the published 512 px model has that of 256 px.
        if encoder.num_images > 1 and encoder.config.sample_size != transformer.config.sample_size:
            raise ValueError(
                "an AR sequence feeds the transformer's images back, but its sample_size is "
                f"{transformer.config.sample_size} and the condition encoder's {encoder.config.sample_size}; they "
                "must be equal"
            )
    if vae is not None:
        check_vae(vae, None if transformer is None else transformer.config.in_channels)


_WITHOUT = {
    "vae": "ask for latents with output_type='latent', and pass scaled latents in place of images",
    "condition_encoder": "pass condition_embeds, tokens (B, M, D), and with guidance negative_condition_embeds",
}


def check_present(**components: object) -> None:
    """Raise ValueError for a component that a call needs and the pipeline was made without."""
    for name, component in components.items():
        if component is None:
            raise missing(name)


def missing(name: str) -> ValueError:
    """The error for a component that the pipeline was made without."""
    other = f", or {_WITHOUT[name]}" if name in _WITHOUT else ""
    return ValueError(f"this pipeline has no {name}, which the call needs; load or make it with one{other}")


def check_scheduler(scheduler: SchedulerMixin | None, transformer: TransDiffTransformer2DModel | None = None) -> None:
    """Raise ValueError for a scheduler that does not sample this flow: it would return noise, or a blurred image.

    diffusers' own schedulers are known by name. One from elsewhere is believed when its config says that it predicts
    flow, or says nothing.
    """
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not hasattr(scheduler, "config"):
        hint = f"{scheduler.__name__}.from_config(pipe.scheduler.config)" if isinstance(scheduler, type) else "one"
        raise TypeError(f"scheduler is {describe(scheduler)}; expected a scheduler of diffusers: pass {hint}")
    name, config = type(scheduler).__name__, scheduler.config
    is_velocity_model = transformer is None or transformer.config.num_flow_map_layers == 0
    if transformer is not None and is_velocity_model and hasattr(scheduler, "next_timesteps"):
        raise ValueError(
            f"{name} asks for average velocities over its long steps, and the transformer is a velocity model "
            "(num_flow_map_layers=0); use another scheduler, or a checkpoint trained as a flow map"
        )
    prediction_type = config.get("prediction_type", "flow_prediction")
    if prediction_type != "flow_prediction":
        raise ValueError(
            f"{name} has prediction_type={prediction_type!r}, but the transformer predicts flow; use a flow-match "
            f"scheduler, or make it with {name}.from_config(pipe.scheduler.config) where it knows 'flow_prediction'"
        )
    if not config.get("use_flow_sigmas", True):
        raise ValueError(
            f"{name} has use_flow_sigmas=False, but the model was trained on the linear path; make it with "
            f"{name}.from_config(pipe.scheduler.config, use_flow_sigmas=True)"
        )
    if type(scheduler).__module__.startswith("diffusers.") and name not in FLOW_SCHEDULERS:
        reason = _UNFIT_SCHEDULERS.get(name, "it does not integrate a flow")
        others = _schedulers_for(is_velocity_model)
        raise ValueError(f"{name} cannot sample this model: {reason}; use one of {', '.join(others)}")
    steps = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if steps != NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{name} has num_train_timesteps={steps}, but the transformer's timestep is {NUM_TRAIN_TIMESTEPS} times "
            f"sigma; make it with {name}.from_config(pipe.scheduler.config, num_train_timesteps={NUM_TRAIN_TIMESTEPS})"
        )
    for option, (value, reason) in (_UNFIT_OPTIONS | _UNFIT_OPTIONS_OF.get(name, {})).items():
        if config.get(option) == value:
            raise ValueError(f"{name} has {option}={value!r}: {reason}; make it with {option} left at its default")
    if name in _MULTISTEP_SCHEDULERS:
        for option in _NOISE_SPACINGS:
            # Karras' spacing works with noise levels of another kind, and only UniPC turns them back into a flow's.
            if config.get(option) and (name, option) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
                raise ValueError(
                    f"{name} has {option}=True: it takes the place of the flow's sigmas and gives NaN; set it to False"
                )


def _schedulers_for(is_velocity_model: bool) -> list[str]:
    """What a refusal names: this package's own schedulers first, and none that needs a time grid of its own form."""
    own = _OWN_SCHEDULERS if is_velocity_model else ("FlowMapScheduler", *_OWN_SCHEDULERS)
    return [name for name in (*own, *FLOW_SCHEDULERS) if name not in _OWN_FORM_OF_SIGMAS]


def guidance_per_image(guidance_scale: float | Sequence[float], num_images: int) -> list[float]:
    """One guidance scale for each image of the AR sequence, from one number or a list of `num_images`.

    Raises:
        TypeError: not a number, or not a list of numbers.
        ValueError: a list of another length; a negative or non-finite scale.
    """
    is_list = isinstance(guidance_scale, (list, tuple))
    scales: list[Any] = list(guidance_scale) if is_list else [guidance_scale] * num_images  # type: ignore[arg-type]
    if len(scales) != num_images:
        raise ValueError(
            f"guidance_scale lists {len(scales)} values, but the model makes {num_images} image(s) a sequence; "
            "pass one number, or one for each"
        )
    for scale in scales:
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"guidance_scale {scale!r} is a {type(scale).__name__}; expected a number")
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance_scale {scale} is not a finite number of at least 0; 1 means no guidance")
    return [float(scale) for scale in scales]


def resolve_guidance(
    guidance_scale: float | Sequence[float] | None,
    recommended: float | Sequence[float] | None,
    num_images: int,
    num_ar_steps: int | None = None,
    single_condition: bool = False,
) -> tuple[float, ...]:
    """Guidance of each image of the sequence that ends with image `num_ar_steps`; the `recommended` one where unset.

    With a `single_condition` one image is made, of whatever its tokens hold: like the last image of a sequence.
    """
    recommended = 1.0 if recommended is None else recommended
    if single_condition:
        recommended, num_images = guidance_per_image(recommended, num_images)[-1], 1
    scales = guidance_per_image(recommended if guidance_scale is None else guidance_scale, num_images)
    return tuple(scales[: check_ar_steps(num_ar_steps, num_images)])


def check_guidance_interval(interval: tuple[float, float] | None) -> None:
    """Raise TypeError or ValueError unless the interval is `(low, high)` with 0 <= low <= high <= 1."""
    if interval is None:
        return
    expected = "expected (low, high) in sigma, 0 <= low <= high <= 1"
    if not isinstance(interval, (list, tuple)) or not all(isinstance(bound, Real) for bound in interval):
        raise TypeError(f"guidance_interval is {interval!r}; {expected}")
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise ValueError(f"guidance_interval is {interval}; {expected}")


def custom_sigmas(
    sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, num_train_timesteps: int
) -> list[float] | None:
    """The σ of a time grid given as `sigmas`, or as `timesteps`, which are `num_train_timesteps` times σ.

    Raises:
        ValueError: both were given, or they do not decrease within (0, 1].
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps were both given; they are the same grid in two units, pass one of them")
    if sigmas is None and timesteps is None:
        return None
    name, top, grid = ("sigmas", 1, sigmas) if timesteps is None else ("timesteps", num_train_timesteps, timesteps)
    try:
        values = [float(value) for value in grid]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {grid!r}; expected a list of decreasing numbers in (0, {top}]") from error
    falling = all(value > later for value, later in pairwise([*values, 0.0]))
    if not values or values[0] > top or not falling:
        raise ValueError(f"{name} are {values}; expected strictly decreasing values in (0, {top}], without the 0")
    return [value / top for value in values]


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int, sigmas: Sequence[float] | None) -> int:
    """The number of steps, which a time grid of the caller's own decides.

    Raises:
        TypeError: `num_inference_steps` is no int.
        ValueError: it is below 1, or the scheduler takes no time grid.
    """
    if sigmas is None:
        check_count("num_inference_steps", num_inference_steps)
        return num_inference_steps
    reads_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not reads_sigmas or type(scheduler).__name__ in _OWN_FORM_OF_SIGMAS:
        raise ValueError(f"{type(scheduler).__name__} takes no custom sigmas; pass num_inference_steps")
    return len(sigmas)


def check_count(name: str, count: int) -> None:
    """Raise TypeError or ValueError unless `count` is an int of at least 1."""
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{name} {count!r} is a {type(count).__name__}; expected an int")
    if count < 1:
        raise ValueError(f"{name} is {count}; at least 1 is needed")


def check_ar_steps(num_ar_steps: int | None, num_images: int) -> int:
    """The images of a sequence to make, `num_images` by default; raise unless they are 1..num_images."""
    if num_ar_steps is None:
        return num_images
    check_count("num_ar_steps", num_ar_steps)
    if num_ar_steps > num_images:
        raise ValueError(f"num_ar_steps is {num_ar_steps}, but there are {num_images} image(s) to a sequence here")
    return num_ar_steps


def check_strength(strength: float) -> None:
    """Raise TypeError or ValueError unless `strength` is a number in [0, 1]."""
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise TypeError(f"strength {strength!r} is a {type(strength).__name__}; expected a number")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; expected a number in [0, 1]: 0 keeps the image, 1 ignores it")


def check_latents(latents: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise TypeError for what is no tensor, ValueError for initial latents of another shape than `(B, C, s, s)`."""
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise TypeError(f"latents is a {type(latents).__name__}; expected a tensor: torch.as_tensor(latents)")
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}: one for each image")


def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Raise TypeError for what is no generator, ValueError for a list that does not have one for each image."""
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in each):
        raise TypeError(f"generator is {generator!r}; expected a torch.Generator, or a list with one for each image")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators were given for {batch_size} images; pass one, or one for each")


def tensor_inputs_of(callback: Callable[..., Any] | None, named: Sequence[str]) -> Sequence[str]:
    """What a callback wants to be given: diffusers' callback objects say it themselves. TypeError for no function."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback_on_step_end is a {type(callback).__name__}; expected a function, called with (pipe, step, "
            "timestep, tensors)"
        )
    is_object = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
    return callback.tensor_inputs if is_object else named  # type: ignore[union-attr]


def check_output(output_type: str, tensor_inputs: Sequence[str], known_tensor_inputs: Sequence[str]) -> None:
    """Raise ValueError for an unknown output type or callback tensor, TypeError for one name in place of a list."""
    if isinstance(tensor_inputs, str):
        raise TypeError(
            f"callback_on_step_end_tensor_inputs is {tensor_inputs!r}; expected a list: [{tensor_inputs!r}]"
        )
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r} is unknown; choose 'pil', 'np', 'pt' or 'latent'")
    unknown = [name for name in tensor_inputs if name not in known_tensor_inputs]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown}; a callback can be given {list(known_tensor_inputs)}"
        )
