"""LoRA files: the names their tensors go by, the adapter's configuration, and whether they fit a model, whole.

A file's tensors are here named as peft names an adapter's: `MODULE.lora_A.weight`, `MODULE.lora_B.weight`. What other
programs put around that is taken off: the adapter's name, `base_model.model.`, `_orig_mod.` and the like.
"""

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusers_internals import diffusers_internal


# What wrappers of models and of their parts put into names: peft, DDP, torch.compile, FSDP, checkpointing.
_WRAPPERS = ("base_model.model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# How programs call the two factors, and what peft calls them.
_FACTORS = {"lora_down": "lora_A", "lora_up": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}

_LAYER = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora[_.](?:down|up))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)

# So many names are listed in an error.
_FEW = 4

# What `fetch_lora` hands on to diffusers' file loader, with its defaults.
FILE_OPTIONS = {
    "weight_name": None,
    "use_safetensors": True,
    "local_files_only": None,
    "cache_dir": None,
    "force_download": False,
    "proxies": None,
    "token": None,
    "revision": None,
    "subfolder": None,
}


class LoraFileError(ValueError, RuntimeError):
    """A LoRA file that cannot be loaded, or not onto this model; the model is as it was.

    A ValueError like every wrong argument, and a RuntimeError because that is what torch raises for a state dict that
    does not fit.
    """


@dataclass
class LoraAdapter:
    """An adapter for one model.

    Attributes:
        layers: its tensors, under peft's names without an adapter name.
        config: the arguments of its `peft.LoraConfig`, where the file has them.
        alphas: alpha of single modules, where the file has such entries.
    """

    layers: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def lora_config(self) -> dict[str, Any]:
        """The arguments of `peft.LoraConfig`: the file's, or what is read off its tensors.

        Raises:
            LoraFileError: alpha is given twice, or an entry is unknown to the installed peft.
        """
        if not self.config:
            return self._config_of_tensors()
        if self.alphas:
            raise LoraFileError("the LoRA file gives alpha twice, in its configuration and in entries '.alpha'")
        if "lora_alpha" not in self.config:
            raise LoraFileError(f"the LoRA file's configuration has no lora_alpha, only {sorted(self.config)}")
        config = _known_arguments(self.config)
        if "r" not in config:
            config = {**self._config_of_tensors(), "alpha_pattern": {}, **config}
        return config

    def _config_of_tensors(self) -> dict[str, Any]:
        """Rank from the shapes; alpha from the file's entries, or the rank, which makes the scale 1."""
        ranks = {}
        for name, tensor in self.layers.items():
            module, _, factor = name.partition(".lora_")
            if factor in ("B.weight", "embedding_B") and tensor.ndim > 1:
                ranks[module] = tensor.shape[1]
        alphas = {module: self.alphas.get(module, rank) for module, rank in ranks.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
            "target_modules": sorted({name.partition(".lora_")[0] for name in self.layers}),
            "use_dora": any("lora_magnitude_vector" in name for name in self.layers),
            "lora_bias": any(name.endswith("lora_B.bias") for name in self.layers),
        }


def _known_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    known = set(LoraConfig.__dataclass_fields__)
    # An entry of a later peft that is switched off asks for nothing.
    unknown = {name: value for name, value in config.items() if name not in known and value}
    unknown = {name: value for name, value in unknown.items() if name != "peft_version"}
    if unknown:
        raise LoraFileError(f"the LoRA file's configuration has {unknown}, which the installed peft does not know")
    ours = {name: value for name, value in config.items() if name in known}
    return {**ours, "inference_mode": False, "base_model_name_or_path": None}


def fetch_lora(source: Any, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors of a LoRA file, folder, repository or state dict under peft's names, and its configuration.

    Args:
        options: see `FILE_OPTIONS`.

    Raises:
        TypeError: an unknown option.
        LoraFileError: there is no LoRA file, or it has tensors that are no LoRA layers.
    """
    unknown = sorted(options.keys() - FILE_OPTIONS.keys())
    if unknown:
        raise TypeError(f"unknown options {unknown}; a LoRA file is found with {sorted(FILE_OPTIONS)}")
    is_path = isinstance(source, (str, os.PathLike)) and (
        Path(source).is_absolute() or Path(source).suffix == ".safetensors" or str(source).startswith((".", "~"))
    )
    if is_path and not Path(source).exists():
        raise LoraFileError(f"there is no file or folder {source}")  # the Hub has no repository of such a name
    source = _of_run(source)
    try:
        tensors, config = diffusers_internal("loaders.lora_base", "_fetch_state_dict")(
            source,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            # A folder without safetensors may hold a .bin file, which diffusers reads as weights only.
            allow_pickle="use_safetensors" not in options,
            **{**FILE_OPTIONS, **options},
        )
    except IndexError:  # raised where the file that would be guessed is not there
        raise LoraFileError(f"{source} has no LoRA file; name it with weight_name=") from None
    except json.JSONDecodeError as error:
        raise LoraFileError(f"the adapter configuration inside {source} is no JSON ({error})") from None
    if config is None and any("base_model.model." in str(name) for name in tensors):
        config = _peft_config_beside(source, options.get("subfolder"))
    return named_as_peft(tensors), config


def _of_run(source: Any) -> Any:
    """The adapters' folder, where `source` is the folder of a training run; else `source` itself."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    is_run = not any(Path(source).glob("*.safetensors")) and any(Path(source).glob("lora/*.safetensors"))
    return Path(source) / "lora" if is_run else source


def _peft_config_beside(source: Any, subfolder: str | None) -> dict[str, Any] | None:
    """peft keeps alpha and all else in a file of its own, beside the weights; None where that is not to be had."""
    if isinstance(source, dict):
        return None
    folder = Path(source).parent if Path(source).is_file() else Path(source, subfolder or "")
    path = folder / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def named_as_peft(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors under peft's names; `MODULE.alpha` entries stay.

    Raises:
        TypeError: it is no dict.
        LoraFileError: the file is empty, a tensor is no LoRA layer or no floating-point tensor, or a module has two.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"the LoRA layers are a {type(tensors).__name__}; expected a model, or a dict of tensors")
    if not tensors:
        raise LoraFileError("the LoRA file is empty; expected names that end in lora_A.weight and lora_B.weight")
    named: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    foreign = []
    for key, tensor in tensors.items():
        name = _peft_name(str(key))
        if name is None:
            foreign.append(key)
            continue
        if name in named:
            raise LoraFileError(f"{sources[name]!r} and {key!r} are two adapters of one layer; keep one of them")
        _check_tensor(str(key), tensor)
        named[name], sources[name] = tensor, str(key)
    if foreign:
        raise LoraFileError(
            f"{foreign[0]!r} is not a LoRA layer ({len(foreign)} of {len(tensors)} such keys); expected names that "
            "end in lora_A.weight and lora_B.weight. Biases and whole modules (peft's bias= and modules_to_save=) are "
            "no LoRA: fine-tune and save the model itself for these"
        )
    return named


def digest_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> str:
    """16 hexadecimal digits of an adapter's tensors, their names and its configuration: equal if all of these are."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_tensor(key: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise LoraFileError(f"{key!r} is a {type(tensor).__name__}; expected a tensor")
    if key.endswith(".alpha"):
        if tensor.numel() != 1:
            raise LoraFileError(f"{key!r} has shape {tuple(tensor.shape)}; alpha is one number")
    elif not tensor.is_floating_point():
        raise LoraFileError(f"{key!r} is of {tensor.dtype}; the tensors of a LoRA are floating-point numbers")


def _peft_name(key: str) -> str | None:
    name = f".{key}"
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}.", ".").replace(f".{wrapper}.", ".")
    name = name[1:]
    if name.endswith(".alpha"):
        return name
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    module, factor, leaf = found["module"], _FACTORS.get(found["factor"], found["factor"]), found["leaf"]
    if factor not in ("lora_A", "lora_B"):  # a parameter of peft's layer, not a layer in it
        return f"{module}.{factor}"
    return f"{module}.{factor}.{leaf or 'weight'}"


def split_by_component(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, components: Iterable[str]
) -> dict[str | None, LoraAdapter]:
    """What of a file belongs to which component; under None what names none.

    A configuration without a component's name holds for all that have none of their own.
    """
    parts: dict[str | None, LoraAdapter] = {}
    for name, tensor in tensors.items():
        component, inner = _split_component(name, components)
        part = parts.setdefault(component, LoraAdapter())
        if inner.endswith(".alpha"):
            part.alphas[inner.removesuffix(".alpha")] = float(tensor)
        else:
            part.layers[inner] = tensor
    configs: dict[str | None, dict[str, Any]] = {}
    for name, value in (config or {}).items():
        component, inner = _split_component(name, components)
        configs.setdefault(component, {})[inner] = value
    for component, part in parts.items():
        part.config = configs.get(component) or configs.get(None) or {}
    return parts


def _split_component(name: str, components: Iterable[str]) -> tuple[str | None, str]:
    head, _, rest = name.partition(".")
    return (head, rest) if rest and head in components else (None, name)


def misfits(model: nn.Module, adapter: LoraAdapter) -> list[str]:
    """What keeps an adapter from fitting a model: missing, unexpected and mis-shaped tensors; empty where it fits.

    The expectation is peft's own: the adapter is put into a copy of the model without weights.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    skeleton = _skeleton(model)
    modules = {name for name, _ in skeleton.named_modules()}
    stray = [f"{name}.alpha" for name in adapter.alphas if f"{name}.lora_B.weight" not in adapter.layers]
    unexpected = stray + [name for name in adapter.layers if name.partition(".lora_")[0] not in modules]
    fitting = {name: tensor for name, tensor in adapter.layers.items() if name not in unexpected}
    expected: dict[str, torch.Size] = {}
    if fitting:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(**adapter.lora_config())
                # A configuration of the file's own says which modules there must be.
                told = None if adapter.config.get("target_modules") else fitting
                inject_adapter_in_model(config, skeleton, "default", low_cpu_mem_usage=True, state_dict=told)
                expected = {name: value.shape for name, value in get_peft_model_state_dict(skeleton).items()}
        except LoraFileError:
            raise
        except (TypeError, ValueError) as error:
            return [f"peft refuses it: {error}"]
    unexpected += [name for name in fitting if name not in expected]
    problems = [
        f"size mismatch for {name!r}: {tuple(fitting[name].shape)} in the file, {tuple(shape)} expected"
        for name, shape in expected.items()
        if name in fitting and fitting[name].shape != shape
    ][:_FEW]
    for what, names in (("missing", [name for name in expected if name not in fitting]), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            problems.append(f"{what} {', '.join(map(repr, names[:_FEW]))}{more}")
    return problems


def _skeleton(model: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model).from_config({**model.config, "_name_or_path": None})
