"""Arguments that other pipelines of diffusers have and these have not: an error says what does the same here."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence


# Patterns of whole names to the argument that is called otherwise here.
_OTHER_NAMES = {
    "class_ids?|classes|label_ids?|labels?|class_label": "class_labels",
    "(num_images|num_videos|num_waveforms)_per_prompt|num_images|num_samples": "num_images_per_label",
    "negative_(prompt_embeds|encoder_hidden_states)": "negative_condition_embeds",
    "prompt_embeds|encoder_hidden_states": "condition_embeds",
    "cfg|cfg_scale|guidance|true_cfg_scale": "guidance_scale",
    "steps|num_steps|num_sampling_steps": "num_inference_steps",
    "noise|init_noise": "latents",
    "init_image|input_image|source_image|original_image": "image",
    "mask|inpaint_mask": "mask_image",
    "(cross|joint)_attention_kwargs": "attention_kwargs",
    "callback|callback_steps|callback_on_step": "callback_on_step_end",
    "callback_tensor_inputs": "callback_on_step_end_tensor_inputs",
}

_EDIT = "TransDiffImg2ImgPipeline.from_pipe(pipe) edits an image"
_REPAINT = "TransDiffInpaintPipeline.from_pipe(pipe) repaints a part of an image"
_REFERENCES = "reference_images start the sequence of an MRAR model from pictures"
_GENERATION = "TransDiffPipeline.from_pipe(pipe) takes it"
_SCHEDULER = "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, diffusion_scale=1.0)"

# Arguments that one of the three pipelines has and another has not.
_ELSEWHERE = {
    "image": f"{_EDIT}; {_REFERENCES}",
    "strength": f"{_EDIT}, as far as its strength says",
    "mask_image": _REPAINT,
    "jump_length": _REPAINT,
    "jump_n_sample": _REPAINT,
    "references": f"it belongs to the editing pipelines; {_REFERENCES}",
    "reference_images": f"{_GENERATION}; in editing, references says what the images before the last one are",
    "num_ar_steps": _GENERATION,
    "return_intermediates": _GENERATION,
    "condition_embeds": _GENERATION,
    "negative_condition_embeds": _GENERATION,
}

# Patterns of whole names to what to do instead; the first that fits counts.
_REMEDIES = {
    "negative_(prompt.*|class_labels?)": "guidance leads away from the null class, which needs no argument; for "
    "tokens of your own in its place, pass negative_condition_embeds",
    ".*prompt.*|text|caption|clean_caption|clip_skip|max_sequence_length": "the model reads no text; pass "
    "class ids or names: pipe('goldfish')",
    "batch_size": "pass a list of class_labels, or num_images_per_label",
    "height|width|resolution|size|image_size|(negative_)?(original_size|target_size|crops_coords_top_left)"
    "|use_resolution_binning": "the model makes images of one size, pipe.image_side pixels; resize them afterwards",
    "num_frames|frame_rate|fps|video|decode_chunk_size": "the model makes single images",
    "guidance_rescale|cfg_truncation|cfg_normalization|control_guidance_(start|end)": "guidance can be left out at "
    "some steps: pass guidance_interval=(low, high) in sigma",
    "pag_.*|stg_scale": "the only guidance is classifier-free: pass guidance_scale",
    "denoising_(start|end)": "pass a time grid of your own as sigmas; an edit takes the last part of the grid, by its "
    "strength",
    "scheduler|sampler": "set it before the call: pipe.scheduler = "
    "UniPCMultistepScheduler.from_config(pipe.scheduler.config)",
    "eta|noise_level|noise_scale|temperature|drift_scale|diffusion_scale|shift": "it is the scheduler that has such "
    f"scales; set them before the call: {_SCHEDULER}",
    "seed|seeds|manual_seed|generators": "pass generator=torch.Generator().manual_seed(0), or a list with one "
    "for each image",
    "padding_mask_crop|masked_image.*": "crop image and mask before the call, and paste the result",
    "ip_adapter_.*|(negative_)?image_embeds|control_image|controlnet_.*|guess_mode|control_mode": _REFERENCES,
    "lora_scale|lora_weights|adapter_.*": "load an adapter with pipe.load_lora_weights(path); "
    "attention_kwargs={'scale': 0.5} weighs it in a call",
    "device|dtype|torch_dtype": "move the pipeline before the call: pipe.to('cuda', torch.bfloat16)",
}


def check_no_others(call: Callable[..., object], unknown: Mapping[str, object]) -> None:
    """Raise TypeError for an argument that `call`, a pipeline's `__call__`, does not have; say what does it here."""
    known = [name for name, kind in inspect.signature(call).parameters.items() if kind.kind is not kind.VAR_KEYWORD]
    for name in unknown:
        raise TypeError(f"{name} is no argument of this pipeline: {_hint(name, known)}")


def _hint(name: str, known: Sequence[str]) -> str:
    argument = _look_up(_OTHER_NAMES, name) or name
    if argument in known:
        return f"pass {argument}"
    hint = _ELSEWHERE.get(argument) or _look_up(_REMEDIES, name)
    if hint is not None:
        return hint
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "help(pipe.__call__) lists them"


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)
