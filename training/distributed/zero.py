"""DeepSpeed's ZeRO stage 2: every process has the whole weights, and a share of the gradients and of the optimiser.

Only the splitting is DeepSpeed's: weights stay float32 under autocast, every process averages all of them, and
checkpoints hold whole tensors, the same files as those of one process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.settings.config import ConfigError, TrainConfig


# What AdamW keeps of each parameter, besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers that are exchanged at once; DeepSpeed's own default would take 2 GB.
BUCKET = 50_000_000


def check_deepspeed(config: TrainConfig) -> None:
    """Let nothing begin that needs DeepSpeed and does not have it.

    Raises:
        ConfigError: if the run asks for DeepSpeed and it is not installed.
    """
    if config.sharding == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError('sharding=zero2 needs DeepSpeed: pip install -e ".[deepspeed]"')


class ZeroEngine:
    """A module and its optimiser in DeepSpeed's hands, called like the module.

    Args:
        module: whole and in float32, on every process; its parameters stay where they are and are stepped in place.
        optimizer: AdamW over the parameters to be trained.
        config: batch size, greatest gradient norm and mixed precision are read.
        device: where the run computes. DeepSpeed would take a GPU wherever it sees one.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        import deepspeed

        self.parameter_numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self.parameters = [value for group in optimizer.param_groups for value in group["params"]]
        self.engine, self.sharded, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, dist_init_required=False, config=deepspeed_config(config)
        )
        self.adamw: torch.optim.Optimizer = self.sharded.optimizer
        self.param_groups = self.adamw.param_groups
        # AdamW steps these, flat: the process's share of the weights of each group, copied
        self.slices = [part for group in self.param_groups for part in group["params"]]

    def __call__(self, **batch: Tensor) -> Tensor:
        return self.engine(**batch)

    def train(self) -> None:
        self.engine.train()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar loss; of a step's `last` batch they are complete.

        DeepSpeed skips a step for its gradients alone, so a loss that is not finite is made to spoil them.
        """
        spoiled = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * spoiled, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Clip, step and clear the gradients; returns their norm before clipping. One that is infinite means that
        the gradients were not finite, and that nothing was changed.
        """
        self.engine.step()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    def zero_grad(self) -> None:
        """`step` has done it."""

    @contextmanager
    def _slices_lent(self) -> Iterator[list[Tensor]]:
        """The slices to put other numbers in; afterwards they are the weights again."""
        try:
            yield self.slices
        finally:
            self.sharded.refresh_fp32_params()

    def state_dict(self, keep: bool) -> dict[str, Any]:
        """The optimiser's state as one process would write it, on the CPU of the processes that `keep` it; all call
        this together.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        rows: dict[int, dict[str, Tensor]] = {}
        if self.adamw.state:
            step = self.adamw.state[self.slices[0]]["step"].detach().cpu()
            rows = {number: {"step": step.clone()} for number in range(len(self.parameters))}
            # DeepSpeed gathers the slices, whatever they hold; what it links to them of AdamW's state exists for the
            # first group alone until the second step
            with self._slices_lent() as slices:
                for name in MOMENTS:
                    for part in slices:
                        part.data.copy_(self.adamw.state[part][name])
                    for number, parameter in enumerate(self.parameters):
                        gathered = safe_get_full_fp32_param(parameter)
                        if keep:
                            rows[number][name] = gathered.cpu()
        settings = zip(self.param_groups, self.parameter_numbers, strict=True)
        return {"state": rows, "param_groups": [group | {"params": numbers} for group, numbers in settings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's share of what `state_dict`, here or of one process, returned; and of the weights, which
        must have been loaded into the module.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        rows = state["state"]
        with self._slices_lent() as slices:
            for group in self.param_groups if rows else ():
                for part in group["params"]:
                    step = rows[0]["step"].clone()
                    self.adamw.state[part] = {"step": step.to(part.device) if group["fused"] else step}
            for name in MOMENTS if rows else ():
                for number, parameter in enumerate(self.parameters):
                    safe_set_full_fp32_param(parameter, rows[number][name].to(parameter.device))
                for part in slices:
                    self.adamw.state[part][name] = part.detach().clone()


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a run; batches are accumulated by the training loop."""
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "torch_autocast": {
            "enabled": config.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are averaged in float32, as without DeepSpeed
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every step
    }
