"""`transdiff convert`: the authors' checkpoints to folders that diffusers loads."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, DType, one_line_errors, scales_in_words


def convert(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the diffusers pipeline.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A released checkpoint-last.pth on this machine.", show_default=False)
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Its VAE: the released .pth, or an AutoencoderKL folder.")] = None,
    repo: Annotated[
        str | None, typer.Option(help="Hub repository to download from instead, laid out as the authors' is.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which model of the repository.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, help="For widths that no published model has: shapes do not tell the heads.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published model whose sampling settings to store, for others like it.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of the stored weights.")] = "float32",
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the TransDiff authors for diffusers.

    The averaged (EMA) weights are taken, the configuration is read off their shapes, and the published sampling
    settings are stored with them.

    \b
    Examples:
      transdiff convert --repo zhendch/Transdiff --model transdiff_l_mrar --output transdiff-l-mrar
      transdiff convert checkpoint-last.pth --vae vae/checkpoint-last.pth --output FOLDER --dtype bfloat16
    """
    if (checkpoint is None) == (repo is None):
        raise typer.BadParameter("give either CHECKPOINT, a file on this machine, or --repo, to download from")
    if checkpoint is not None and (vae is None or model is not None):
        raise typer.BadParameter("with CHECKPOINT give --vae, and no --model")
    if repo is not None and (model is None or vae is not None):
        raise typer.BadParameter("with --repo give --model, and no --vae: it is in the repository")
    with one_line_errors(debug):
        import torch

        from transdiff_pipelines import convert_original_checkpoint
        from transdiff_pipelines.files import refuse_existing
        from transdiff_pipelines.loaders import download_original, save_converted
        from transdiff_pipelines.presets import ORIGINAL_REPOSITORY, PUBLISHED, published_model

        refuse_existing(output)
        if preset is not None:
            published_model(preset)
        if checkpoint is None or vae is None:
            checkpoint, vae = download_original(str(model), str(repo))
        pipe = convert_original_checkpoint(checkpoint, vae, num_attention_heads, preset, dtype=getattr(torch, dtype))
        # Only weights from the authors' repository get a model card: of another file nothing but the shapes is known.
        published = PUBLISHED.get(str(model)) if repo == ORIGINAL_REPOSITORY else None
        save_converted(pipe, output, card=published)

        parameters = pipe.condition_encoder.num_parameters() + pipe.transformer.num_parameters()
        scales = pipe.scheduler.config.drift_scale, pipe.scheduler.config.diffusion_scale
        recommended = scales_in_words(pipe.config.guidance_scale, *scales)
        label = "goldfish" if "goldfish" in pipe.labels else "0"
        typer.echo(f"{output}: {parameters:,} parameters beside the VAE's; recommended {recommended}")
        typer.echo(f"  next: transdiff generate {label} --model {shlex.quote(str(output))}")
