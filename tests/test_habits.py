"""Arguments that people bring from diffusers' other pipelines: each error says what does the same here."""

import inspect

import pytest
import torch
from PIL import Image
from tiny import CHANNELS, SIDE, tiny_pipeline

from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffInpaintPipeline, TransDiffPipeline


PIXELS = 2 * SIDE
PIPELINES = [TransDiffPipeline, TransDiffImg2ImgPipeline, TransDiffInpaintPipeline]

# What twenty or more of diffusers' pipelines take, and a few names of older ones and of other libraries.
ARGUMENTS_OF_OTHERS = """
attention_kwargs batch_size callback callback_steps cfg_scale clean_caption clip_skip control_guidance_end
control_guidance_start control_image controlnet_conditioning_scale crops_coords_top_left cross_attention_kwargs
decode_chunk_size denoising_end denoising_start device eta guidance_rescale height image init_image
ip_adapter_image ip_adapter_image_embeds joint_attention_kwargs mask mask_image masked_image_latents
max_sequence_length negative_pooled_prompt_embeds negative_prompt negative_prompt_2
negative_prompt_attention_mask negative_prompt_embeds num_frames num_images_per_prompt num_samples num_steps
num_videos_per_prompt original_size padding_mask_crop pag_scale pooled_prompt_embeds prompt prompt_2
prompt_attention_mask prompt_embeds scheduler seed sigmas strength target_size timesteps true_cfg_scale
use_resolution_binning video width
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def pipes():
    pipe = tiny_pipeline()
    return {cls: pipe if cls is TransDiffPipeline else cls.from_pipe(pipe) for cls in PIPELINES}


def parameters_of(cls):
    return {name for name in inspect.signature(cls.__call__).parameters if name not in ("self", "others")}


def error_of(pipe, **arguments):
    with pytest.raises(TypeError) as refused:
        pipe(**arguments)
    return str(refused.value)


@pytest.mark.parametrize("cls", PIPELINES)
def test_every_habit_hears_what_does_it_here(cls, pipes):
    """Without the arguments that the pipeline needs, too: Python would name these, and not the habit."""
    strange = [name for name in ARGUMENTS_OF_OTHERS if name not in parameters_of(cls)]
    assert len(strange) > 40
    for name in strange:
        message = error_of(pipes[cls], **{name: 4})
        assert message.startswith(f"{name} is no argument of this pipeline: ")
        assert not any(vague in message for vague in ("help(pipe", "did you mean"))


@pytest.mark.parametrize("cls", PIPELINES)
def test_arguments_of_one_pipeline_are_known_in_the_others(cls, pipes):
    everywhere = set().union(*map(parameters_of, PIPELINES))
    for name in everywhere - parameters_of(cls):
        assert "from_pipe(pipe)" in error_of(pipes[cls], **{name: 4}) or name == "references"


@pytest.mark.parametrize("cls", PIPELINES)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("prompt", r"pass class ids or names: pipe('goldfish')"),
        ("negative_prompt", "null class"),
        ("num_images_per_prompt", "pass num_images_per_label"),
        ("height", "the model makes images of one size"),
        ("seed", "manual_seed(0), or a list with one for each image"),
        ("callback", "pass callback_on_step_end"),
        ("guidence_scale", "did you mean guidance_scale?"),
        ("zzz", "help(pipe.__call__)"),
    ],
)
def test_hints(cls, pipes, name, hint):
    assert hint in error_of(pipes[cls], **{name: 4})


def test_a_name_is_translated_where_the_pipeline_has_it(pipes):
    assert error_of(pipes[TransDiffImg2ImgPipeline], init_image=4).endswith("pass image")
    assert error_of(pipes[TransDiffInpaintPipeline], mask=4).endswith("pass mask_image")
    assert "TransDiffImg2ImgPipeline.from_pipe(pipe)" in error_of(pipes[TransDiffPipeline], init_image=4)


def test_every_argument_named_in_a_hint_exists():
    from transdiff_pipelines.pipelines.habits import _ELSEWHERE, _OTHER_NAMES

    assert {*_OTHER_NAMES.values(), *_ELSEWHERE} <= set().union(*map(parameters_of, PIPELINES))


def test_what_an_edit_needs_is_named(pipes):
    latents = torch.zeros(1, CHANNELS, SIDE, SIDE)
    mask = Image.new("L", (PIXELS, PIXELS))
    assert "class label None" in error_of(pipes[TransDiffImg2ImgPipeline], image=latents)
    assert error_of(pipes[TransDiffImg2ImgPipeline], class_labels=0).startswith("image is NoneType; expected")
    inpaint = pipes[TransDiffInpaintPipeline]
    assert error_of(inpaint, image=latents, class_labels=0).startswith("mask_image is NoneType")
    assert error_of(inpaint, mask_image=mask, class_labels=0).startswith("image is NoneType")
