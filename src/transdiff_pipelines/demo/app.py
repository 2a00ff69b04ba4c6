"""The page. This file is also a Hugging Face Space's `app.py`: the Space's variable TRANSDIFF_MODEL names the model,
the bundled emoji without it.

No visitor's input reaches the model unchecked (`request.py`), and no visitor reads a path or a traceback: what was
not foreseen goes to the server's log.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: nothing is sent anywhere

import gradio as gr

from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.attribution import WORKS, credits
from transdiff_pipelines.demo.drawing import draw_frames
from transdiff_pipelines.demo.request import (
    BLEND,
    CLASSES,
    MAX_IMAGES,
    MAX_SCALE,
    MAX_SEED,
    MAX_STEPS,
    MAX_UPLOAD_BYTES,
    MODES,
    PICTURE,
    DemoRequest,
    make_request,
)
from transdiff_pipelines.demo.view import CSS, sequence_html
from transdiff_pipelines.generation import SDE_SAMPLERS, load_pipeline, own_sampler, samplers_for


DEFAULT_MODEL = "emoji"
CONCURRENT_REQUESTS = 2
QUEUE_LENGTH = 16
DELETE_FILES_AFTER = 3600  # seconds; also how often Gradio looks

UNFORESEEN = "Something went wrong on the server, and it was logged there. Other settings may work."

ABOUT = """# TransDiff

**How it draws.** A class becomes *condition tokens*; a diffusion transformer paints the image under them, from noise,
step by step. With several images to a sequence (MRAR), each is made with those before it as references, and the last
is the result: click it to download it."""

EXAMPLES = ("dog face", "golden retriever", "pizza")
"""Names of the classes that the page opens with: the first two that the model knows."""
PARTNERS = ("cat face", "tiger cat")
"""Names of the class that the first of these is blended with: the first one that the model knows."""

PICTURE_HELP = "It starts the sequence in place of a drawn image. PNG, JPEG or WebP; the centre square is taken."


def build(pipe: TransDiffPipeline, model: str | None = None) -> gr.Blocks:
    """The page for a loaded pipeline; `model` is its name for visitors, as `transdiff generate --model` takes it."""
    num_images = pipe.condition_encoder.num_images
    names = {label: _name(pipe, label) for label in range(pipe.condition_encoder.config.num_classes)}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    spoken = {label: name for label, name in names.items() if name not in shared and not name.isdecimal()}
    choices = [(f"{name} ({label})" if name in shared else name, label) for label, name in names.items()]
    examples = _classes(pipe, EXAMPLES, [3, 7])
    blended = (examples[0], _classes(pipe, PARTNERS, [len(names) - 2])[0])
    pixelated = ["pixelated"] if pipe.image_side <= 64 else []

    def request(*values: Any) -> DemoRequest:
        return make_request(pipe, model, *values)

    def draw(*values: Any) -> Iterator[tuple[Any, ...]]:
        asked = _for_visitors(lambda: request(*values))
        captions = [asked.caption(number, names) for number in range(asked.num_images)]
        frames = draw_frames(pipe, asked)
        try:
            yield sequence_html(captions, num_images), asked.recipe(spoken)
            while (frame := _for_visitors(lambda: next(frames))).results is None:
                yield sequence_html(captions, num_images, frame), gr.skip()
            yield sequence_html(captions, num_images, frame, asked), gr.skip()
        finally:
            frames.close()

    def recipe(*values: Any) -> str:
        try:
            return request(*values).recipe(spoken)
        except (ValueError, TypeError) as error:
            return f"# {_message(error)}"

    with gr.Blocks(title="TransDiff", analytics_enabled=False, delete_cache=(DELETE_FILES_AFTER,) * 2) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                modes = MODES if num_images > 1 else (CLASSES, BLEND)
                mode = gr.Radio(modes, value=CLASSES, label="What to draw", elem_id="mode")
                labels = gr.Dropdown(
                    choices, value=examples, multiselect=True, max_choices=MAX_IMAGES,
                    label="Classes", info="Type to search; several are drawn together.", elem_id="classes",
                )  # fmt: skip
                with gr.Group(visible=False) as blend_controls:
                    first = gr.Dropdown(choices, value=blended[0], label="First class", elem_id="first")
                    second = gr.Dropdown(choices, value=blended[1], label="Second class", elem_id="second")
                    share = gr.Slider(
                        0, 1, 0.5, step=0.05, label="Blend", info="0 is the first class, 1 the second.",
                        elem_id="share",
                    )  # fmt: skip
                with gr.Group(visible=False) as picture_controls:
                    upload = gr.File(label="Your picture", file_types=["image"], height=120, elem_id="upload")
                    gr.Markdown(PICTURE_HELP, container=True)
                with gr.Row():
                    count = gr.Number(2, label="Images of each", precision=0, minimum=1, maximum=MAX_IMAGES,
                                      min_width=120, elem_id="count")  # fmt: skip
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120,
                                     elem_id="seed")  # fmt: skip
                with gr.Accordion("Sampler", open=False):
                    scheduler = gr.Dropdown(
                        samplers_for(pipe), value=own_sampler(pipe) or "euler-maruyama", label="Scheduler",
                        elem_id="scheduler",
                        info="The paper's is euler-maruyama, with 100 steps.",
                    )  # fmt: skip
                    steps = gr.Slider(1, MAX_STEPS, pipe.config.num_inference_steps or 50, step=1,
                                      label="Steps", elem_id="steps",
                                      info="Denoising steps for each image of the sequence.")  # fmt: skip
                    guidance = gr.Number(
                        None, label="Guidance", minimum=0, maximum=MAX_SCALE, step=0.1, elem_id="guidance",
                        info=f"1 is none; empty is the model's own, {_own_guidance(pipe)}.",
                    )  # fmt: skip
                    with gr.Row() as scales:
                        drift = _scale(pipe, "drift_scale", "Drift scale")
                        diffusion = _scale(pipe, "diffusion_scale", "Diffusion scale")
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Column(scale=3, min_width=300):
                sequence = gr.HTML(sequence_html([], num_images), elem_id="sequence", elem_classes=pixelated)
        code = gr.Code(language="shell", label="The same without this page", interactive=False, lines=1,
                       wrap_lines=True, show_line_numbers=False, elem_id="recipe", buttons=["copy"])  # fmt: skip
        if model in WORKS:
            gr.Markdown(credits(model), elem_id="credits")

        controls: list[Any] = [mode, labels, first, second, share, upload, count, seed, steps, guidance, scheduler,
                               drift, diffusion]  # fmt: skip
        private: Any = {"api_visibility": "private"}
        mode.change(
            lambda chosen: [gr.update(visible=chosen != BLEND), gr.update(visible=chosen == BLEND),
                            gr.update(visible=chosen == PICTURE)],
            mode, [labels, blend_controls, picture_controls], show_progress="hidden", **private,
        )  # fmt: skip
        scheduler.change(
            lambda name: gr.update(visible=name in SDE_SAMPLERS), scheduler, scales, show_progress="hidden", **private
        )
        gr.on(
            [page.load, *(control.change for control in controls)], recipe, controls, code,
            trigger_mode="always_last", show_progress="hidden", **private,
        )  # fmt: skip
        drawing = button.click(
            draw, controls, [sequence, code], concurrency_limit=CONCURRENT_REQUESTS,
            trigger_mode="once", show_progress="hidden", **private,
        )  # fmt: skip
        stop.click(None, cancels=[drawing], **private)
    return page.queue(max_size=QUEUE_LENGTH)


def launch(model: str | None = None, host: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model: folder or Hub repository of a pipeline, or the name of a bundled one; None is the emoji.
        host: address to serve on; None is Gradio's own choice, this machine alone, or that of a Space.
        port: None is the first free one from 7860 on.
        share: also make a public link, through Gradio's servers.

    Raises:
        ValueError, OSError: the model cannot be loaded, or the port is taken.
    """
    model = model or DEFAULT_MODEL
    # Visitors are not shown where a folder lies on this machine.
    shown = Path(model).resolve().name if Path(model).exists() else model
    build(load_pipeline(model), shown).launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        css=CSS,
        # The page uses fonts of the visitor's system, so that it asks no other server for anything.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def _for_visitors(work: Callable[[], Any]) -> Any:
    """What `work` returns; an error becomes a message that a visitor may read."""
    try:
        return work()
    except Exception as error:
        raise gr.Error(_message(error), print_exception=False) from error


def _message(error: Exception) -> str:
    """The message of a ValueError or TypeError, which names the remedy; of others, or with a path in it, none."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError)) and text and not re.search(r"[/\\]\w|Traceback", text):
        return text[0].upper() + text[1:]
    logging.getLogger(__name__).error("a request of the demo failed", exc_info=error)
    return UNFORESEEN


def _name(pipe: TransDiffPipeline, label: int) -> str:
    return (pipe.config.id2label or {}).get(label, str(label))


def _classes(pipe: TransDiffPipeline, wanted: Sequence[str], otherwise: Sequence[int]) -> list[int]:
    """Classes of the names wanted, as many as `otherwise` has; or where they are missing, those ids, or class 0."""
    found = [pipe.labels[name] for name in wanted if name in pipe.labels][: len(otherwise)]
    if len(found) == len(otherwise):
        return found
    return [label for label in otherwise if 0 <= label < pipe.condition_encoder.config.num_classes] or [0]


def _own_guidance(pipe: TransDiffPipeline) -> str:
    own = pipe.config.guidance_scale
    return ", ".join(f"{scale:g}" for scale in own) if isinstance(own, (list, tuple)) else f"{own or 1:g}"


def _scale(pipe: TransDiffPipeline, name: str, label: str) -> gr.Slider:
    own = pipe.scheduler.config.get(name, 1.0)
    return gr.Slider(0, 2, own, step=0.01, label=label, min_width=120, elem_id=name)


if __name__ == "__main__":
    launch(os.environ.get("TRANSDIFF_MODEL"))
