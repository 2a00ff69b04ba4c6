"""A device that is not the CPU, for tests on machines that have no other: `DEVICE`, called "elsewhere".

It computes with the CPU's kernels and, as a GPU does, refuses operations whose tensors lie on different devices. It
also notes each time that a program would wait for a GPU: when it reads a number back, makes a shape depend on numbers,
or copies between the devices and does not say `non_blocking`.

A tensor of the device is a wrapper around a tensor of the CPU. What makes tensors (`torch.empty(device="elsewhere")`)
comes in through the fallback of PyTorch's dispatch key PrivateUse1, all else through `__torch_dispatch__`. Importing
this module registers the device for the process; it is only "available" inside `second_device()`, so that the tests
of other files see the CPU alone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _State:
    available = False
    waits: list[str] | None = None
    generators: set[int] = set()


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _State.available

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Backend(_DummyBackendModule):
    """What `torch.elsewhere` has, as `torch.cuda` for CUDA."""

    def is_available(self) -> bool:
        return _State.available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("elsewhere", backend_module=_Backend(), hook=_Hooks())
DEVICE = torch.device("elsewhere", 0)


class SecondTensor(torch.Tensor):
    """A tensor of the device; `inner` is the one of the CPU that holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "SecondTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(operator, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.inner}, on {DEVICE}"

    # What PyTorch answers from a tensor's own memory, which a wrapper lacks.
    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)


class SecondGenerator(torch.Generator):
    """A generator of the device; PyTorch cannot make one for a device that is set up from Python."""

    def __init__(self) -> None:
        _State.generators.add(self._cdata)

    @property
    def device(self) -> torch.device:
        return DEVICE


def _is_second(value: Any) -> bool:
    return isinstance(value, SecondTensor)


def _compute(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the tensors within, and wrap what it makes."""
    name = operator._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    _check_devices(name, tensors, kwargs)
    if _would_wait(name, tensors, args, kwargs):
        _note_wait(name)
    to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda value: value.inner if _is_second(value) else value, (args, kwargs))
    # An operator that works in place returns one of its arguments, which must come back as the same object.
    known = {id(tensor.inner if _is_second(tensor) else tensor): tensor for tensor in tensors}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in known:
            return known.get(id(value), value)
        return value if to_cpu else SecondTensor(value)

    return tree_map(wrapped, operator(*args, **kwargs))


COPIES = ("copy_", "_to_copy", "_copy_from", "_foreach_copy_")


def _check_devices(name: str, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    # A number in a tensor of the CPU may meet tensors of a GPU, and an index is brought there.
    strangers = [tensor for tensor in tensors if not _is_second(tensor) and tensor.ndim > 0]
    is_index = name in ("index", "index_put", "index_put_", "_index_put_impl_") and _is_second(tensors[0])
    if strangers and name not in COPIES and not is_index:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in strangers)
        raise RuntimeError(f"{name}: all tensors must be on {DEVICE}, but found some of shape {shapes} on the CPU")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in _State.generators:
        raise RuntimeError(f"{name}: expected a generator on {DEVICE}, but found one on the CPU")


READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
         "repeat_interleave", "bincount", "allclose")  # fmt: skip


def _would_wait(name: str, tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> bool:
    if name in COPIES:
        target = kwargs.get("device")
        places = {tensor.device.type for tensor in tensors} | ({torch.device(target).type} if target else set())
        non_blocking = kwargs.get("non_blocking", args[2:] == (True,))
        source = tensors[-1]  # a copy to the CPU has to be waited for, or its numbers are not there yet
        return len(places) > 1 and not (non_blocking and source.device.type == "cpu")
    if name.startswith(("index", "_index_put")):
        return any(tensor.dtype in (torch.bool, torch.uint8) or not _is_second(tensor) for tensor in tensors[1:])
    return name in READS


def _note_wait(name: str) -> None:
    if _State.waits is None:
        return
    places, frame = [], sys._getframe(1)  # `traceback` would read the source of every frame
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "site-packages" not in file:
            places.append(f"{file.rpartition('/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    _State.waits.append(f"{name} at {' < '.join(places[:4])}")


def _synchronize(device: Any = None) -> None:
    _note_wait("synchronize")


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """The list of all waits inside the `with` block, each with the place in the code."""
    _State.waits = waits = []
    try:
        yield waits
    finally:
        _State.waits = None


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Make the device available, as the accelerator of the machine."""
    _State.available = True
    torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(.., device="elsewhere")` passes by the dispatch
    try:
        with mock.patch("torch.accelerator.synchronize", _synchronize):
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _State.available = False


# --- autocast, by the shortest of CUDA's lists that the models need ---

TO_HALF = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
TO_FLOAT = ("layer_norm", "group_norm", "softmax.int", "mse_loss", "pow.Tensor_Scalar", "norm.Scalar")


def _autocast(operator: Any, to_half: bool) -> Any:
    def cast(value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()) or value.dtype == torch.float64:
            return value
        return value.to(torch.get_autocast_dtype("elsewhere") if to_half else torch.float32)

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(cast, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operator(*args, **kwargs)

    return run


_FALLBACKS, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_FALLBACKS.fallback(lambda operator, *args, **kwargs: _compute(operator, args, kwargs), "PrivateUse1")
_FALLBACKS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _names, _to_half in ((TO_HALF, True), (TO_FLOAT, False)):
    for _name in _names:
        _packet, _, _overload = _name.partition(".")
        _operator = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _ATEN.impl(_operator, _autocast(_operator, _to_half), "AutocastPrivateUse1")
