"""LoRA adapters on a model: loaded whole or not at all, never lost to another function, never saved as weights."""

import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from .lora_file import FILE_OPTIONS, LoraAdapter, LoraFileError, fetch_lora, misfits, split_by_component


# Names that peft confuses with parts of its own names.
_RESERVED_NAMES = ("weight", "bias", "alpha", "base_layer", "lora_A", "lora_B")


def check_adapter_name(name: str | None) -> None:
    """Raise TypeError or ValueError for a name under which peft cannot keep an adapter; None is no name yet."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"adapter_name {name!r} is a {type(name).__name__}; expected a str")
    if not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; it needs at least one character, and none of them may be a dot")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name in _RESERVED_NAMES:
        raise ValueError(f"adapter_name is {name!r}, a name that torch or peft uses itself; choose another")


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that peft has put in, whatever their kind."""
    # Where nobody has imported peft there are none, and it need not be installed.
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return [] if peft is None else [layer for layer in model.modules() if isinstance(layer, peft.BaseTunerLayer)]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in a model."""
    return list(getattr(model, "peft_config", None) or {})


def fused_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters whose weights are added to the model's own at the moment."""
    return list(dict.fromkeys(name for layer in adapter_layers(model) for name in layer.merged_adapters))


def check_not_fused(model: nn.Module) -> None:
    """Raise ValueError where adapters are fused: another one, or other weights of these, would unfuse them."""
    if fused := fused_adapters(model):
        raise ValueError(
            f"{fused} are fused into the weights of {type(model).__name__}, and another adapter would unfuse them; "
            "call unfuse_lora() first, or keep them in the weights for good with unload_lora_weights()"
        )


def check_can_change(model: nn.Module) -> None:
    """Raise ValueError where adapters are fused: with another scale, or without them, they could not be taken out."""
    if fused := fused_adapters(model):
        raise ValueError(
            f"{fused} are fused into the weights of {type(model).__name__}, and could not be taken out of them again "
            "after this change; call unfuse_lora() first, or keep them in the weights for good with "
            "unload_lora_weights()"
        )


def restore_scaling(model: nn.Module) -> None:
    """Give adapters that were fused with a scale the scale that they had before."""
    for layer in adapter_layers(model):
        layer.scaling.update(layer.__dict__.pop("_scaling_unfused", {}))


def check_adapter_weights(weights: Any) -> None:
    """Raise TypeError or ValueError unless `weights`, and those in its lists and dicts, are finite numbers or None."""
    if isinstance(weights, (list, tuple, Mapping)):
        for weight in weights.values() if isinstance(weights, Mapping) else weights:
            check_adapter_weights(weight)
    elif weights is not None:
        if isinstance(weights, bool) or not isinstance(weights, Real):
            raise TypeError(f"the adapter's weight {weights!r} is a {type(weights).__name__}; expected a number")
        if not math.isfinite(weights):
            raise ValueError(f"the adapter's weight is {weights}; expected a finite number")


def check_takes_adapter(model: nn.Module, modules: set[str]) -> None:
    """Raise ValueError where adapters on `modules` would be lost, or take another one's effect away."""
    name = type(model).__name__
    check_not_fused(model)
    _check_unfused_projections(model, modules)
    if _is_cast_by_layer(model):
        raise ValueError(
            f"{name} has layerwise casting on, which would keep the adapter in the storage dtype; load the adapter "
            "first, then call enable_layerwise_casting()"
        )


def check_weights_present(model: nn.Module) -> None:
    """Raise ValueError where weights are elsewhere: an adapter goes to the device of its layer's weights."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            f"weights of {type(model).__name__} are on the meta device, or offloaded by accelerate; load the adapter "
            "first, then offload"
        )


def check_loads(model: nn.Module, adapter: LoraAdapter, adapter_name: str | None, hotswap: bool = False) -> None:
    """Raise where an adapter cannot be loaded onto a model, whole and under that name; see `AdapterMixin`."""
    check_adapter_name(adapter_name)
    name, present = type(model).__name__, adapter_names(model)
    if hotswap and adapter_name not in present:
        raise ValueError(f"hotswap replaces an adapter, and {name} has none called {adapter_name!r}, only {present}")
    if not hotswap and adapter_name in present:
        raise ValueError(
            f"Adapter name {adapter_name} already in use in {name}; choose another, or delete_adapters() it"
        )
    if problems := misfits(model, adapter):
        raise LoraFileError(f"the LoRA file does not fit {name}: {'; '.join(problems)}")
    if hotswap:
        _check_swaps(model, adapter, str(adapter_name))
    else:
        check_takes_adapter(model, {key.partition(".lora_")[0] for key in adapter.layers})


def _check_swaps(model: Any, adapter: LoraAdapter, adapter_name: str) -> None:
    """Raise where peft cannot swap: it would stop half-way, or set another scale than the file's."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from peft.utils.hotswap import check_hotswap_configs_compatible
    from peft.utils.other import get_pattern_key

    check_not_fused(model)
    config = LoraConfig(**adapter.lora_config())
    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    new = sorted(adapter.layers.keys() - get_peft_model_state_dict(model, adapter_name=adapter_name).keys())
    if new:
        raise LoraFileError(f"{new[0]!r} is on a layer that {adapter_name!r} does not adapt; load it without hotswap")
    for module in {key.partition(".lora_")[0] for key in adapter.layers}:
        rank, alpha = (
            (pattern or {}).get(get_pattern_key(list(pattern or {}), module), otherwise)
            for pattern, otherwise in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        power = 0.5 if config.use_rslora else 1
        if alpha / rank**power != config.lora_alpha / config.r**power:
            raise LoraFileError(
                f"{module!r} has another scale, alpha / rank, than other layers; hotswap knows one, load it without"
            )


def _check_unfused_projections(model: nn.Module, modules: set[str]) -> None:
    for name, attention in model.named_modules():
        if getattr(attention, "fused_projections", False):
            unused = {"to_k", "to_v"} if attention.is_cross_attention else {"to_q", "to_k", "to_v"}
            lost = sorted(f"{name}.{projection}" for projection in unused if f"{name}.{projection}" in modules)
            if lost:
                raise ValueError(
                    f"{lost[0]!r} takes no part while projections are fused, and its adapter would not either; call "
                    "unfuse_qkv_projections() first"
                )


def _is_cast_by_layer(model: nn.Module) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(registry is not None and "layerwise_casting" in registry.hooks for registry in registries)


@contextmanager
def adapters_restored_on_failure(model: Any) -> Iterator[None]:
    """Where the block fails, take out the adapters that it put in, and leave everything as it was."""
    names, loaded = adapter_names(model), getattr(model, "_hf_peft_config_loaded", False)
    active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(model)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        _remove_adapters(model, names)
        model._hf_peft_config_loaded = loaded
        for layer, active_names in active:
            layer.set_adapter(active_names)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


def _remove_adapters(model: Any, kept: list[str]) -> None:
    if not kept:
        model.unload_lora()
        return
    for layer in adapter_layers(model):
        for name in {name for part in layer.adapter_layer_names for name in getattr(layer, part)} - set(kept):
            layer.delete_adapter(name)
    _remove_empty_layers(model)
    for name in set(adapter_names(model)) - set(kept):
        del model.peft_config[name]


def _remove_empty_layers(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if layer in adapter_layers(model) and not any(len(getattr(layer, part)) for part in layer.adapter_layer_names):
            model.set_submodule(name, layer.get_base_layer())


# Models that have been given an adapter, to know again the tensors that somebody takes out of one.
_ADAPTED: weakref.WeakSet[Any] = weakref.WeakSet()


def config_of_layers(layers: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The configuration of the adapter whose very memory these tensors are, as `get_peft_model_state_dict` gives them.

    diffusers' idiom for saving hands over the tensors alone, and alpha is none of them. None for copies.
    """
    places = {tensor.data_ptr() for tensor in layers.values() if tensor.device.type != "meta"}
    for model in list(_ADAPTED) if places else []:
        for name in adapter_names(model):
            own = {value.data_ptr() for key, value in model.named_parameters() if f".{name}." in f"{key}."}
            if places <= own:
                return model.peft_config[name].to_dict()
    return None


class AdapterMixin(PeftAdapterMixin):
    """diffusers' `PeftAdapterMixin`, all or nothing."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """`PeftAdapterMixin.add_adapter`: a new adapter to train; a failure leaves the model as it was.

        Raises:
            TypeError, ValueError: a name that peft cannot keep, or the model cannot take an adapter now.
        """
        check_adapter_name(adapter_name)
        check_not_fused(self)
        with adapters_restored_on_failure(self):
            super().add_adapter(adapter_config, adapter_name)
            adapted = {name for name, layer in self.named_modules() if hasattr(layer, "base_layer")}
            _check_unfused_projections(self, adapted)
        _ADAPTED.add(self)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """`PeftAdapterMixin.load_lora_adapter`, for files under any of the usual names.

        Args:
            prefix: the part of the file that is this model's, the component's name in a pipeline; None is all of it.
            kwargs: where to find the file (see `lora_file.FILE_OPTIONS`); `adapter_name`; `metadata`, the adapter's
                configuration under names with the prefix; `low_cpu_mem_usage`.

        Raises:
            LoraFileError: the file does not fit the model; the message names what is missing and unexpected.
            TypeError, ValueError: the name is taken or impossible, or the model cannot take an adapter now.

        Nothing is changed where it fails.
        """
        options = {name: kwargs.pop(name) for name in FILE_OPTIONS if name in kwargs}
        tensors, config = fetch_lora(pretrained_model_name_or_path_or_dict, **options)
        config = kwargs.pop("metadata", None) or config
        components = [prefix] if prefix is not None else []
        adapter = split_by_component(tensors, config, components).get(prefix)
        if adapter is None:
            raise LoraFileError(
                f"none of the {len(tensors)} tensors belongs to {prefix!r}, {next(iter(tensors))!r} for one"
            )
        check_loads(self, adapter, kwargs.get("adapter_name"), hotswap)
        self.load_adapter_layers(adapter, hotswap=hotswap, **kwargs)

    def load_adapter_layers(
        self, adapter: LoraAdapter, adapter_name: str | None = None, hotswap: bool = False, **kwargs: Any
    ) -> None:
        """Put an adapter for which `check_loads` has passed into the model; a failure leaves the model as it was."""
        check_weights_present(self)
        with adapters_restored_on_failure(self):
            super().load_lora_adapter(
                adapter.layers,
                prefix=None,
                adapter_name=adapter_name,
                hotswap=hotswap,
                metadata=adapter.lora_config(),
                **kwargs,
            )
        _ADAPTED.add(self)

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """`PeftAdapterMixin.set_adapters`; ValueError while adapters are fused, or for a weight that is none."""
        check_can_change(self)
        check_adapter_weights(weights)
        super().set_adapters(adapter_names, weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """`PeftAdapterMixin.delete_adapters`; layers that have no adapter left are the model's own again.

        Raises:
            ValueError: adapters are fused.
        """
        check_can_change(self)
        super().delete_adapters(adapter_names)
        # peft leaves its layers in, empty, and their names are none of the model's: it could not be saved.
        _remove_empty_layers(self)
        if not getattr(self, "peft_config", True):
            self.unload_lora()

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """`PeftAdapterMixin.fuse_lora`; what fails leaves the weights as they were.

        diffusers scales every active adapter anew with each call, also those that are in the weights already, and
        never back: `unfuse_lora` would take out something else than was put in.
        """
        check_adapter_weights(lora_scale)
        before = [(layer, list(layer.merged_adapters), dict(layer.scaling)) for layer in adapter_layers(self)]
        for layer, merged, scaling in before:
            if not merged:
                layer._scaling_unfused = scaling
            for name in set(layer.active_adapters if adapter_names is None else adapter_names) - set(merged):
                if name in scaling:
                    layer.scaling[name] = scaling[name] * lora_scale
        try:
            super().fuse_lora(1.0, safe_fusing, adapter_names)
        except BaseException:
            for layer, merged, scaling in before:
                changed = layer.merged_adapters != merged
                if changed:
                    layer.unmerge()
                layer.scaling.update(scaling)
                if changed and merged:
                    layer.merge(adapter_names=merged)
            raise

    def unfuse_lora(self) -> None:
        """`PeftAdapterMixin.unfuse_lora`; the adapters have the scale again that they had before they were fused."""
        super().unfuse_lora()
        restore_scaling(self)

    def fuse_qkv_projections(self) -> None:
        """`AttentionMixin.fuse_qkv_projections`; ValueError where an adapter would be left out of the projections."""
        adapted = [name for name, layer in self.named_modules() if layer in adapter_layers(self)]
        lost = [name for name in adapted if name.rpartition(".")[-1] in ("to_q", "to_k", "to_v")]
        if lost:
            raise ValueError(
                f"{lost[0]!r} has a LoRA adapter, which fused projections would leave out; make it part of the "
                "weights first, with fuse_lora() and unload_lora_weights()"
            )
        super().fuse_qkv_projections()
