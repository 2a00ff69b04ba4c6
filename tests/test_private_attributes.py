"""Private attributes of other libraries that the code reads: where it does, and what to do when they are gone.

Names that are imported from diffusers have a test of their own, `test_diffusers_internals.py`.
"""

import accelerate
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


def test_torch_can_be_told_that_a_size_changes():
    """`pipelines/conditions.py` tells a compiled encoder. Without it a sequence recompiles more often: see what took
    the place of `maybe_mark_dynamic`, and whether the counts of `tests/test_compile.py` hold."""
    torch._dynamo.maybe_mark_dynamic(torch.zeros(2, 3), 0)


def test_a_storage_has_a_number():
    """`training/dry_run.py` counts every storage once by its `_cdata`; `data_ptr()` is 0 on the meta device."""
    first, second = (torch.empty(2, device="meta") for _ in range(2))
    assert first.untyped_storage()._cdata == first[1:].untyped_storage()._cdata != second.untyped_storage()._cdata


def test_a_compiled_module_can_be_run_uncompiled():
    """`training/dry_run.py` runs it so, to count its operations; otherwise let it compile only after the dry run."""
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = None
    assert module(torch.zeros(1, 2)).shape == (1, 2)


def test_a_scheduler_lists_the_entries_that_were_left_at_their_default():
    """`schedulers/flow_match.py` shortens the list, because diffusers' `from_config` drops what is in it. If the list
    is gone, so may be the dropping: if `tests/test_schedulers_swapping.py` passes without those lines, delete them."""
    assert "shift" in FlowMatchEulerDiscreteScheduler().config._use_default_values


def test_hooks_are_found_on_their_modules():
    """`pipelines/hooks.py` looks for `_hf_hook` and `_diffusers_hook`. If it cannot find them, a condition is computed
    outside of the hooks, and calls overlap that must not: find out where the libraries keep their hooks now."""
    module = nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert isinstance(module._hf_hook, accelerate.hooks.ModelHook)
    assert accelerate.hooks.AlignDevicesHook().offload is False
    registry = HookRegistry.check_if_exists_or_initialize(module)
    assert module._diffusers_hook is registry
    assert not registry.hooks
    registry.register_hook(ModelHook(), "mine")
    assert list(registry.hooks) == ["mine"]
