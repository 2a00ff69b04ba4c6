"""What a visitor sees of a run: a table of pictures in plain HTML, with the pictures inside: no file is written."""

import base64
import io
from html import escape

from PIL import Image, PngImagePlugin

from .drawing import Frame
from .request import DemoRequest


THUMBNAIL_SIDE = 256

CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#sequence .bar {height: .4rem; border-radius: .2rem; background: var(--border-color-primary); margin: .4rem 0 .8rem}
#sequence .bar div {height: 100%; border-radius: inherit; background: var(--color-accent)}
#sequence .scroll {overflow-x: auto}
#sequence table {border-collapse: separate; border-spacing: 6px; border: 0; margin: 0; width: auto}
#sequence tr, #sequence th, #sequence td {padding: 0; border: 0; background: none}
#sequence th {font-weight: 400; font-size: .85rem; text-align: center}
#sequence th.name {text-align: left; padding-right: .4rem; max-width: clamp(3.5rem, 14vw, 9rem);
    overflow-wrap: anywhere}
#sequence td img, #sequence td div {width: clamp(48px, 14vw, 84px); aspect-ratio: 1; border-radius: 4px; margin: 0;
    display: block}
#sequence td:last-child img, #sequence td:last-child div {width: clamp(64px, 20vw, 128px)}
#sequence td div {border: 1px dashed var(--border-color-primary)}
#sequence td.painting img {outline: 2px solid var(--color-accent)}
#sequence .pixelated img, #sequence.pixelated img {image-rendering: pixelated}
"""


def sequence_html(
    captions: list[str], num_images: int, frame: Frame | None = None, finished: DemoRequest | None = None
) -> str:
    """A row for each image asked for, a column for each image of its sequence, boxes where nothing is painted yet.

    Args:
        captions: of the rows; none before the first run.
        frame: what there is to see; None before the first step.
        finished: the request, once it is done: the last column then offers its images for download.
    """
    if not captions:
        return '<div role="status">Press Draw to watch the images appear.</div>'
    if frame is None:
        state, share = "Starting …", 0.0
    elif frame.results is not None:
        state, share = "Done.", 1.0
    else:
        state = f"Image {len(frame.sequence)} of {num_images}, step {frame.step} of {frame.num_steps}"
        share = frame.step / frame.num_steps
    head = "".join(f"<th>{'result' if i == num_images else i}</th>" for i in range(1, num_images + 1))
    rows = "".join(
        f'<tr><th class="name">{escape(caption)}</th>{_cells(row, num_images, frame, finished)}</tr>'
        for row, caption in enumerate(captions)
    )
    return (
        f'<div role="status">{state}</div><div class="bar"><div style="width: {share:.1%}"></div></div>'
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'
    )


def _cells(row: int, num_images: int, frame: Frame | None, finished: DemoRequest | None) -> str:
    pictures = [] if frame is None else [batch[row] for batch in frame.sequence]
    cells = [f"<td>{_img(picture, number)}</td>" for number, picture in enumerate(pictures, start=1)]
    if finished is not None:
        png = _data_uri(pictures[-1], "png", finished.png_info(row))
        name = f"transdiff-{finished.settings.seed + row}.png"
        cells[-1] = (
            f'<td><a download="{name}" title="Download {name}" href="{png}">{_img(pictures[-1], num_images)}</a></td>'
        )
    elif pictures and frame is not None and frame.results is None:
        cells[-1] = cells[-1].replace("<td>", '<td class="painting">')
    return "".join(cells + ["<td><div></div></td>"] * (num_images - len(cells)))


def _img(picture: Image.Image, number: int) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    uri = _data_uri(small, "png" if small.size == picture.size else "jpeg")
    return f'<img alt="image {number} of the sequence" src="{uri}">'


def _data_uri(picture: Image.Image, kind: str, info: PngImagePlugin.PngInfo | None = None) -> str:
    data = io.BytesIO()
    picture.save(data, kind, **({"pnginfo": info} if info else {}))
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
