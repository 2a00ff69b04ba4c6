"""LoRA adapters of a pipeline: one file for the condition encoder's and the decoder's layers.

The keys of a file are the peft names of a component's layers behind the component's name,
`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`: what `get_peft_model_state_dict` gives in a training
script, packed by `save_lora_weights`. `models.lora_file` reads those that other programs write.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import logging
from torch import nn

from ..files import new_files
from ..models.adapters import (
    adapter_layers,
    adapter_names,
    adapters_restored_on_failure,
    check_adapter_name,
    check_adapter_weights,
    check_can_change,
    check_loads,
    config_of_layers,
    restore_scaling,
)
from ..models.attention import check_attention_kwargs, weighable_layers
from ..models.lora_file import LoraAdapter, LoraFileError, fetch_lora, misfits, named_as_peft, split_by_component


logger = logging.get_logger(__name__)

LoraLayers = Mapping[str, torch.Tensor] | nn.Module


class TransDiffLoraLoaderMixin(LoraBaseMixin):
    """Load, save, weigh, fuse and unload LoRA adapters on the condition encoder and on the decoder."""

    _lora_loadable_modules = ["condition_encoder", "transformer"]

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The tensors of a LoRA file, folder, repository or state dict, and with `return_lora_metadata` its config.

        Names are peft's, `COMPONENT.MODULE.lora_A.weight`, whatever the program that wrote the file calls them.

        Args:
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `proxies`,
                `local_files_only`, `use_safetensors`, as in `from_pretrained`.

        Raises:
            TypeError: an unknown option.
            LoraFileError: the file is empty, or a tensor is not a LoRA layer.
        """
        state_dict, metadata = fetch_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the components that the file has layers for, and make it active there.

        The names of the file may be those of peft, with or without `base_model.model.` and an adapter's name, or have
        `lora_down` and `lora_up` with `.alpha`. Without a component's name in front they must fit one component alone.

        Args:
            pretrained_model_name_or_path_or_dict: Hub repository, folder, file or state dict.
            adapter_name: its name in `set_adapters`; by default "default_0", "default_1" and so on.
            hotswap: replace the loaded adapter of that name in place, without recompilation.
            low_cpu_mem_usage: allocate the adapter's tensors once, from the file.
            kwargs: where to find the file; see `lora_state_dict`.

        Raises:
            LoraFileError: the file does not fit, whole; the message names what is missing and unexpected.
            TypeError, ValueError: the name is taken or impossible, or a component cannot take an adapter now.

        No component is changed where it fails.
        """
        check_adapter_name(adapter_name)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        models = self._lora_models()
        adapters = _adapters_of(models, state_dict, metadata)
        if adapter_name is None and not hotswap:
            adapter_name = self._free_adapter_name()
        others = [name for name in models if name not in adapters and adapter_name in adapter_names(models[name])]
        if others:
            raise ValueError(
                f"Adapter name {adapter_name} already in use in {others[0]}, which this file has no layers for; "
                "choose another, or delete_adapters() it first"
            )
        for name, adapter in adapters.items():
            check_loads(models[name], adapter, adapter_name, hotswap)
            if not (adapter.config or adapter.alphas):
                logger.warning(
                    f"the LoRA for {name} does not say its alpha, so its scale is 1; if alpha / rank was another "
                    "one in training, give that as the weight in set_adapters"
                )
        with self._weights_in_place(models), ExitStack() as stack:
            # All or nothing: half an adapter is a third model that nobody trained.
            for name in adapters:
                stack.enter_context(adapters_restored_on_failure(models[name]))
            for name, adapter in adapters.items():
                models[name].load_adapter_layers(
                    adapter, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_cpu_mem_usage
                )

    def _lora_models(self) -> dict[str, Any]:
        """The components that can have adapters; what is compiled, as it was before."""
        models = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {name: getattr(model, "_orig_mod", model) for name, model in models.items() if model is not None}

    @contextmanager
    def _weights_in_place(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Bring back what `enable_sequential_cpu_offload` has taken off the models, and take it off again."""
        offloaded = any(
            parameter.device.type == "meta" for model in models.values() for parameter in model.parameters()
        )
        device = getattr(self, "_offload_device", None)
        if not offloaded or device is None:
            yield
            return
        self.remove_all_hooks()
        try:
            yield
        finally:
            self.enable_sequential_cpu_offload(device=device)

    def _free_adapter_name(self) -> str:
        taken = {name for names in self.get_list_adapters().values() for name in names}
        return next(name for name in (f"default_{i}" for i in range(len(taken) + 1)) if name not in taken)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        condition_encoder_lora_layers: LoraLayers | None = None,
        transformer_lora_layers: LoraLayers | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        condition_encoder_lora_adapter_metadata: dict | None = None,
        transformer_lora_adapter_metadata: dict | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Write adapters of either component, or both, to one file.

        Args:
            save_directory: folder to write to; the file in it is `weight_name`, by default
                `pytorch_lora_weights.safetensors`.
            condition_encoder_lora_layers, transformer_lora_layers: the model with the adapter, whose configuration is
                kept then; or what peft's `get_peft_model_state_dict(model)` gives.
            is_main_process: False writes nothing, for the other processes of a distributed run.
            condition_encoder_lora_adapter_metadata, transformer_lora_adapter_metadata: the adapter's config,
                `model.peft_config[adapter_name].to_dict()`. Where it is not given, that of the model whose tensors the
                layers are; of copies it cannot be found, and a warning says that the scale alpha / rank is lost.
            adapter_name: which adapter of a model that has several.

        Raises:
            TypeError: layers that are neither a model nor a dict of tensors.
            ValueError: no layers were given, or some that are none, or a model without an adapter of that name; or a
                `weight_name` that would not be loaded.
        """
        layers = {"condition_encoder": condition_encoder_lora_layers, "transformer": transformer_lora_layers}
        metadata = {
            "condition_encoder": condition_encoder_lora_adapter_metadata,
            "transformer": transformer_lora_adapter_metadata,
        }
        given = {name: component for name, component in layers.items() if component}
        if not given:
            raise ValueError("no LoRA layers to save; pass transformer_lora_layers or condition_encoder_lora_layers")
        _check_file_name(weight_name, safe_serialization and save_function is None)
        if not is_main_process:
            return
        holds_config = safe_serialization and save_function is None
        for name, component in given.items():
            given[name], config = _layers_and_config(component, adapter_name)
            metadata[name] = metadata[name] or (config if holds_config else None)
            if metadata[name] is None:
                remedy = (
                    f"pass {name}_lora_layers=pipe.{name}, or {name}_lora_adapter_metadata="
                    f"pipe.{name}.peft_config[NAME].to_dict()"
                    if holds_config
                    else "only safetensors files, written without a save_function, can hold it"
                )
                logger.warning(
                    f"{name}'s LoRA is saved without its configuration, so that it will be loaded at scale 1, "
                    f"whatever alpha / rank is; {remedy}"
                )
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=given,
            lora_metadata={name: metadata[name] for name in given},
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    @staticmethod
    def write_lora_layers(
        state_dict: dict[str, torch.Tensor], save_directory: str | os.PathLike, **kwargs: Any
    ) -> None:
        """Write the file under a temporary name first, so that an interrupted save leaves no half of one.

        Under diffusers' own names a folder has one LoRA: that of an earlier save in the other format is removed.
        """
        with new_files(save_directory) as scratch:
            LoraBaseMixin.write_lora_layers(state_dict, scratch, **kwargs)
            saved = {file.name for file in scratch.iterdir()}
        formats = {LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE}
        if saved & formats:
            for other in formats - saved:
                Path(save_directory, other).unlink(missing_ok=True)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are active on any component."""
        layers = (layer for model in self._lora_models().values() for layer in adapter_layers(model))
        return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

    def _check_attention_kwargs(self, attention_kwargs: Any) -> None:
        """Raise for what a call would not read; a weight of adapters where there are none is only said."""
        scale = check_attention_kwargs(attention_kwargs)
        layers = [weighable_layers(model, scale) for model in self._lora_models().values()] if scale != 1 else [[None]]
        if not any(layers):
            logger.warning(f"attention_kwargs has scale {scale}, but no LoRA is loaded: it changes nothing")

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Make these adapters the active ones, with their weights: one for all, or one for each; by default 1.

        Raises:
            TypeError, ValueError: no names or unknown ones, a weight that is no finite number, or adapters are fused.
        """
        if not adapter_names:
            raise ValueError("adapter_names is empty; disable_lora() switches all adapters off")
        for model in self._lora_models().values():
            check_can_change(model)
        check_adapter_weights(adapter_weights)
        weights = list(adapter_weights) if isinstance(adapter_weights, tuple) else adapter_weights
        super().set_adapters(adapter_names, weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Take adapters out of both components; ValueError for an unknown name, and while adapters are fused."""
        self._check_present([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        for model in self._lora_models().values():
            check_can_change(model)
        super().delete_adapters(adapter_names)

    def _check_present(self, names: Sequence[str]) -> None:
        present = {name for model in self._lora_models().values() for name in adapter_names(model)}
        if missing := [name for name in names if name not in present]:
            raise ValueError(f"there is no adapter called {missing[0]!r}; the pipeline has {sorted(present)}")

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters to the weights of `components`, by default both: no cost at run time.

        Raises:
            ValueError: no component has an adapter of one of the `adapter_names`.
        """
        self._check_present(adapter_names or [])
        super().fuse_lora(components or self._lora_loadable_modules, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights of `components` again, by default both."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)
        # diffusers goes to the layers by itself, and knows nothing of what `AdapterMixin.fuse_lora` keeps.
        for name, model in self._lora_models().items():
            if not components or name in components:
                restore_scaling(model)


def _check_file_name(name: str | None, safetensors: bool) -> None:
    """Raise ValueError for a file that would not be loaded: its ending decides how it is read."""
    if name is None:
        return
    if Path(name).name != name:
        raise ValueError(f"weight_name is {name!r}; expected a file's name, whose folder is save_directory")
    if (Path(name).suffix == ".safetensors") != safetensors:
        raise ValueError(
            f"weight_name is {name!r}; it must end in .safetensors"
            if safetensors
            else f"weight_name is {name!r}, but what is written is no safetensors file; use another ending, .bin"
        )


def _layers_and_config(
    layers: LoraLayers, adapter_name: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """An adapter's tensors and its configuration, of a model or of the layers that somebody took out of one."""
    if not isinstance(layers, nn.Module):
        layers = named_as_peft(layers)
        return layers, config_of_layers(layers)
    from peft.utils import get_peft_model_state_dict

    model: Any = getattr(layers, "module", layers)  # as DistributedDataParallel wraps it
    model = getattr(model, "_orig_mod", model)
    names = adapter_names(model)
    if adapter_name is None and len(names) == 1:
        adapter_name = names[0]
    if adapter_name not in names:
        raise ValueError(
            f"{type(model).__name__} has the adapters {names}; adapter_name is {adapter_name!r}, name one"
        )
    tensors = named_as_peft(get_peft_model_state_dict(model, adapter_name=adapter_name))
    return tensors, model.peft_config[adapter_name].to_dict()


def _adapters_of(
    models: Mapping[str, nn.Module], state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None
) -> dict[str, LoraAdapter]:
    """A file's adapters by component. Tensors that name no component are those of the one that they fit.

    Raises:
        LoraFileError: they fit none, or several, or the file names a component for others.
    """
    parts = split_by_component(state_dict, metadata, models)
    unnamed = parts.pop(None, None)
    if unnamed is None:
        return {str(name): part for name, part in parts.items()}
    names = [*unnamed.layers, *(f"{module}.alpha" for module in unnamed.alphas)]
    described = f"{len(names)} of {len(state_dict)} tensors belong to no component, {names[0]!r} for one"
    if parts:
        raise LoraFileError(f"{described}; put {' or '.join(f'{name}.' for name in models)} before their names")
    problems = {name: misfits(model, unnamed) for name, model in models.items()}
    fitting = [name for name, found in problems.items() if not found]
    if len(fitting) == 1:
        return {fitting[0]: unnamed}
    if fitting:
        raise LoraFileError(
            f"{described}, and they fit {' and '.join(fitting)}; put the component's name before theirs"
        )
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in problems.items())
    underscored = re.search(r"_\d+_", names[0].partition(".")[0])
    kohya = "; kohya's names, with underscores, are not understood" if underscored else ""
    raise LoraFileError(f"{described}, and they do not fit any ({reasons}){kohya}")
