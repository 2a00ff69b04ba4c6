"""Weights that two pipelines side by side have in common and that are stored once.

A folder with the file SHARED_NAME has no weights of the components that it names, only their configs; they are loaded
from a pipeline's folder beside it. So a flow map, in which the transformer alone is new, can come with its teacher.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from ..models import ARConditionEncoder


SHARED_NAME = "shared_weights.json"

_CLASSES = {"condition_encoder": ARConditionEncoder, "vae": AutoencoderKL}


def shared_folders(folder: Path) -> dict[str, Path]:
    """For the components of the pipeline in `folder` that have their weights elsewhere, the folder of the component.

    Raises:
        OSError: the file names another component than `condition_encoder` and `vae`, or the pipeline beside `folder`
            is not there.
    """
    path = folder / SHARED_NAME
    if not path.is_file():
        return {}
    found = {}
    for component, name in json.loads(path.read_text(encoding="utf-8")).items():
        if component not in _CLASSES or not isinstance(name, str) or Path(name).name != name:
            raise OSError(
                f"{path} has {component!r}: {name!r}; expected one of {', '.join(_CLASSES)} with the name of a folder "
                f"beside {folder}"
            )
        found[component] = folder.parent / name / component
        if not found[component].is_dir():
            raise OSError(f"{path} shares the {component} of {name}, but {found[component]} does not exist: copy both")
    return found


def load_shared(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The components that `arguments`, those of `from_pretrained`, do not give already, in the dtype wanted there."""
    wanted = arguments.get("dtype", arguments.get("torch_dtype"))
    components = {}
    for component, place in shared_folders(folder).items():
        if component not in arguments:
            dtype = wanted.get(component, wanted.get("default")) if isinstance(wanted, Mapping) else wanted
            given = {} if dtype is None else {"dtype": dtype}
            components[component] = _CLASSES[component].from_pretrained(place, **given)
    return components
