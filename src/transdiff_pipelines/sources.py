"""What a model's name stands for: a bundled model, a folder, a repository of the Hub. And which one draws a label."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from . import DIGITS, DIGITS_FLOW_MAP, EMOJI
from .files import INDEX, pipeline_folder, why_no_pipeline
from .hub_access import check_hub_has
from .loaders.original_repository import explain_original_repository
from .pipelines.class_labels import NUMBER, ClassNames, closest_names


BUNDLED = {"digits": DIGITS, "digits-flow-map": DIGITS_FLOW_MAP, "emoji": EMOJI}
"""Names of the models that come with the package, and their folders."""


def model_source(model: str | None) -> str:
    """What `from_pretrained` loads for the name of a model; None is the bundled digits.

    The name of a bundled model is one, unless a pipeline or a training run of that name lies in the present folder.

    Raises:
        ValueError: `model` is a file.
        OSError: there is no such folder, or it is no pipeline's.
    """
    if model is None:
        return str(DIGITS)
    if model in BUNDLED and not _is_of_a_model(Path(model)):
        return str(BUNDLED[model])
    if Path(model).is_file():
        raise ValueError(
            f"model {model} is a file; expected a pipeline's folder. A released checkpoint is converted first: "
            f"transdiff convert {shlex.quote(model)} --vae VAE.pth --output FOLDER"
        )
    folder = Path(model).expanduser()
    if not folder.exists():
        if is_repository_name(model):
            if explanation := explain_original_repository(model):  # known by its name, without the Hub
                raise ValueError(explanation)
            check_hub_has(model)
            return model
        *names, last = BUNDLED
        raise FileNotFoundError(
            f"model {model} does not exist; expected a pipeline's folder, a Hub OWNER/NAME or one of the bundled "
            f"{', '.join(names)} and {last}"
        )
    place = pipeline_folder(folder)
    if (place / INDEX).is_file():
        return str(place)
    raise FileNotFoundError(explain_original_repository(folder) or f"model {model} {why_no_pipeline(folder)}")


def _is_of_a_model(folder: Path) -> bool:
    """Whether a folder holds a pipeline or the checkpoints of a training run, and not, say, pictures."""
    return (pipeline_folder(folder) / INDEX).is_file() or (folder / "checkpoints").is_dir()


def is_repository_name(model: str) -> bool:
    """Whether `model` reads as OWNER/NAME and not as a path."""
    return model.count("/") == 1 and model[0] not in "./~" and not model.endswith("/")


def model_for_labels(labels: Sequence[str]) -> str | None:
    """The bundled model that draws these labels where no model is named.

    Returns:
        "emoji" if all labels are names of its classes; None, which is the digits, if they are numbers or none.

    Raises:
        ValueError: no bundled model draws them all.
    """
    numbers = [label for label in labels if NUMBER.fullmatch(label)]
    names = [label for label in labels if label not in numbers]
    if not names:
        return None
    index = json.loads((Path(model_source("emoji")) / INDEX).read_text(encoding="utf-8"))
    known = ClassNames(index.get("id2label")).unambiguous
    unknown = [name for name in names if name not in known]
    if unknown:
        close = closest_names(unknown[0], known)
        nearest = f"; the nearest names are {', '.join(map(repr, close))}" if close else ""
        raise ValueError(
            f"no bundled model draws {unknown[0]!r}{nearest}. digits draws 0 to 9, and emoji the names that transdiff "
            "info emoji lists; name another model with --model"
        )
    if numbers:
        raise ValueError(
            f"no bundled model draws both {numbers[0]!r} and {names[0]!r}: digits draws 0 to 9, and emoji knows "
            f"{names[0]!r}. Draw them one after the other, or name a model with --model"
        )
    return "emoji"
