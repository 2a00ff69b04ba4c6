"""`transdiff demo`: the web page."""

from importlib.util import find_spec
from typing import Annotated

import typer

from .common import MODEL_HELP, Debug, one_line_errors


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=MODEL_HELP,
            show_default="emoji",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines of the network in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to serve on.", show_default="a free one from 7860 on")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through Gradio's servers.")] = False,
    debug: Debug = False,
) -> None:
    """Open a web page that draws, until Ctrl-C.

    It needs Gradio: pip install "transdiff_pipelines[demo]"

    \b
    Examples:
      transdiff demo                                     # the emoji of the package
      transdiff demo --model digits-flow-map
      transdiff demo --model FOLDER --port 8000
    """
    with one_line_errors(debug):
        if find_spec("gradio") is None:
            raise ImportError('the demo needs gradio, which is not installed: pip install "transdiff_pipelines[demo]"')
        from transdiff_pipelines.demo import launch

        launch(model, host, port, share)
