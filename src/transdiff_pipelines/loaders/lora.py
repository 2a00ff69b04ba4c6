"""LoRA adapters of a pipeline: one file for the condition encoder's and the decoder's layers.

The keys of a file are the peft names of a component's layers behind the component's name,
`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`: what `get_peft_model_state_dict` gives in a training
script, packed by `save_lora_weights`.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import logging
from torch import nn


logger = logging.get_logger(__name__)

LoraLayers = Mapping[str, nn.Module | torch.Tensor]

# What `lora_state_dict` hands on to diffusers' file loader, with its defaults.
_FILE_OPTIONS = {
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

        Args:
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `proxies`,
                `local_files_only`, `use_safetensors`, as in `from_pretrained`.

        Raises:
            TypeError: an unknown option.
            ValueError: a tensor is not a LoRA layer.
        """
        unknown = sorted(kwargs.keys() - _FILE_OPTIONS.keys())
        if unknown:
            raise TypeError(f"unknown options {unknown}; a LoRA file is found with {sorted(_FILE_OPTIONS)}")
        options = {**_FILE_OPTIONS, **kwargs}
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            # A folder without safetensors may hold a .bin file, which diffusers reads as weights only.
            allow_pickle="use_safetensors" not in kwargs,
            **options,
        )
        foreign = [key for key in state_dict if "lora" not in key]
        if foreign:
            raise ValueError(
                f"{foreign[0]!r} is not a LoRA layer ({len(foreign)} such keys); expected names with 'lora'"
            )
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

        Args:
            pretrained_model_name_or_path_or_dict: Hub repository, folder, file or state dict.
            adapter_name: its name in `set_adapters`; by default "default_0", "default_1" and so on.
            hotswap: replace the loaded adapter of that name in place, without recompilation.
            low_cpu_mem_usage: allocate the adapter's tensors once, from the file.
            kwargs: where to find the file; see `lora_state_dict`.

        Raises:
            ValueError: a tensor is not a LoRA layer, or the name is taken. No component is changed then.
        """
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        by_component = {name: _has_prefix(state_dict, name) for name in self._lora_loadable_modules}
        strangers = [key for key in state_dict if not any(key.startswith(f"{name}.") for name in by_component)]
        if strangers:
            logger.warning(
                f"No LoRA keys associated to {' or '.join(by_component)} in {len(strangers)} of {len(state_dict)} "
                f"tensors, {strangers[0]!r} for one; they are ignored"
            )
        if adapter_name is None:
            adapter_name = self._free_adapter_name()

        loaded: list[str] = []
        for name in (name for name, has_layers in by_component.items() if has_layers):
            try:
                getattr(self, name).load_lora_adapter(
                    state_dict,
                    prefix=name,
                    adapter_name=adapter_name,
                    # Where the file has no configuration for a component, the loader reads one off the shapes.
                    metadata=metadata if metadata and _has_prefix(metadata, name) else None,
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    _pipeline=self,
                )
            except Exception:
                # All or nothing: half an adapter is a third model that nobody trained.
                if not hotswap:
                    for done in loaded:
                        getattr(self, done).delete_adapters(adapter_name)
                raise
            loaded.append(name)

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
    ) -> None:
        """Write adapters of either component, or both, to one file.

        Args:
            save_directory: folder to write to; the file in it is `weight_name`, by default
                `pytorch_lora_weights.safetensors`.
            condition_encoder_lora_layers, transformer_lora_layers: what peft's `get_peft_model_state_dict(model)`
                gives.
            is_main_process: False writes nothing, for the other processes of a distributed run.
            condition_encoder_lora_adapter_metadata, transformer_lora_adapter_metadata: the adapter's config,
                `model.peft_config[adapter_name].to_dict()`; without it the scale alpha / rank is taken as 1.

        Raises:
            ValueError: no layers were given.
        """
        layers = {"condition_encoder": condition_encoder_lora_layers, "transformer": transformer_lora_layers}
        metadata = {
            "condition_encoder": condition_encoder_lora_adapter_metadata,
            "transformer": transformer_lora_adapter_metadata,
        }
        given = {name: component for name, component in layers.items() if component}
        if not given:
            raise ValueError("no LoRA layers to save; pass transformer_lora_layers or condition_encoder_lora_layers")
        if not is_main_process:
            return
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
        """Write the file under a temporary name first, so that an interrupted save leaves no half of one."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".lora-") as scratch:
            LoraBaseMixin.write_lora_layers(state_dict, scratch, **kwargs)
            for file in Path(scratch).iterdir():
                os.replace(file, Path(save_directory) / file.name)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are active on any component."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # here, because exported code must load without peft

        models = [getattr(self, name) for name in self._lora_loadable_modules if getattr(self, name, None) is not None]
        layers = (layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters to the weights of `components`, by default both: no cost at run time."""
        super().fuse_lora(components or self._lora_loadable_modules, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights of `components` again, by default both."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)


def _has_prefix(keys: Mapping[str, Any], component: str) -> bool:
    return any(key.startswith(f"{component}.") for key in keys)
