"""`transdiff info`: what a checkpoint is, from its configuration files alone."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from .common import MODEL_HELP, Debug, one_line_errors, scales_in_words


MAX_CLASSES_SHOWN = 60  # all of the bundled emoji


def info(
    model: Annotated[
        str | None,
        typer.Argument(help=MODEL_HELP, show_default="digits"),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", "-s", help="Show the classes with these words in their name, or this number."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is.

    Its components and their parameters, its images, its recommended settings and its classes, by number and name.
    Only configuration files are read: of a Hub repository no weights are downloaded.

    \b
    Examples:
      transdiff info                                     # the digits of the package
      transdiff info emoji                               # what names can be drawn?
      transdiff info FOLDER --search terrier             # which classes are terriers?
    """
    with one_line_errors(debug):
        from transdiff_pipelines.sources import model_source

        source = model_source(model)
        index = _pipeline_index(source)
        # Sorted, because JSON has the ids as texts, where 10 comes before 2.
        names = dict(sorted((int(class_id), name) for class_id, name in (index.get("id2label") or {}).items()))
        # The search comes before the description, so that one which finds nothing prints its error alone.
        classes = _found(names, search) if search is not None else names
        if search is None:
            for line in _description(source, index):
                typer.echo(line)
            classes = dict(list(names.items())[:MAX_CLASSES_SHOWN])
        for class_id, name in classes.items():
            typer.echo(f"{class_id:>6}  {name}")
        if search is None and len(names) > len(classes):
            command = f"transdiff info {shlex.quote(str(model))} --search TEXT"
            typer.echo(f"   ...  {len(names) - len(classes)} more: {command}")


def _pipeline_index(source: str) -> dict[str, Any]:
    """model_index.json; an error for what is no TransDiff pipeline."""
    from transdiff_pipelines import TransDiffPipeline

    index: dict[str, Any] = TransDiffPipeline.load_config(source)
    if not str(index.get("_class_name")).startswith("TransDiff"):
        raise ValueError(f"{source} is a {index.get('_class_name')}; expected a TransDiff pipeline")
    return index


def _description(source: str, index: Mapping[str, Any]) -> Iterator[str]:
    from accelerate import init_empty_weights
    from diffusers import ModelMixin

    from transdiff_pipelines.latents import vae_stride
    from transdiff_pipelines.presets import DEFAULT_NUM_INFERENCE_STEPS

    configs = {}
    yield f"{source}: {index['_class_name']}"
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            continue
        cls = _component_class(entry[1])
        configs[name] = cls.load_config(source, subfolder=name)
        size = ""
        if issubclass(cls, ModelMixin):
            with init_empty_weights():
                size = f"{cls.from_config(configs[name]).num_parameters():>15,} parameters"
        yield f"  {name:<18} {entry[1]:<32}{size}".rstrip()
    encoder, transformer, vae = (configs[name] for name in ("condition_encoder", "transformer", "vae"))
    images = encoder["patch_size"] ** 2
    side = transformer["sample_size"] * vae_stride(vae)
    yield f"images: {side} x {side} pixels, {'1-step' if images == 1 else f'MRAR, {images} to a sequence'}"
    scheduler = configs["scheduler"]
    scales = scheduler.get("drift_scale"), scheduler.get("diffusion_scale")
    steps = index.get("num_inference_steps") or DEFAULT_NUM_INFERENCE_STEPS
    yield f"recommended: {scales_in_words(index.get('guidance_scale'), *scales)}, {steps} steps"
    yield f"classes: {encoder['num_classes']}" + ("" if index.get("id2label") else ", without names")


def _component_class(name: str) -> Any:
    """A class of a pipeline's index; importing the package has put its own beside diffusers'."""
    import diffusers

    import transdiff_pipelines

    cls = getattr(transdiff_pipelines, name, None) or getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise ValueError(f"the pipeline has a component of class {name!r}, which diffusers does not know")
    return cls


def _found(names: Mapping[int, str], text: str) -> dict[int, str]:
    from transdiff_pipelines.pipelines.class_labels import ClassNames

    wanted = text.casefold().split()

    def fits(class_id: int, name: str) -> bool:
        return text == str(class_id) or all(part in name.casefold() for part in wanted)

    found = {class_id: name for class_id, name in names.items() if fits(class_id, name)}
    if not found:
        ClassNames(names).id_of(text)  # its error names the nearest
    return found
