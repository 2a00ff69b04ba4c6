"""DeepSpeed's ZeRO stage 2: every process has the whole weights, and a share of the gradients and of the optimiser.

Only the splitting is DeepSpeed's: weights stay float32 under autocast, every process averages all of them, and
checkpoints hold whole tensors, the same files as those of one process.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, TrainConfig


# What AdamW keeps of each parameter, besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers that are exchanged at once; DeepSpeed's own default would take 2 GB.
BUCKET = 50_000_000


def check_deepspeed(config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: if the run asks for DeepSpeed and it is not installed.
    """
    if config.sharding != "zero2":
        return
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError('sharding=zero2 needs DeepSpeed: pip install -e ".[deepspeed]"') from error


class ZeroEngine:
    """A module and its optimiser in DeepSpeed's hands, called like the module.

    Args:
        module: whole and in float32, on every process; its parameters stay where they are and are stepped in place.
        optimizer: AdamW over the parameters to be trained.
        config: batch size, greatest gradient norm and mixed precision are read.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self.parameters = [value for group in optimizer.param_groups for value in group["params"]]
        self.engine, self.sharded, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, dist_init_required=False, config=deepspeed_config(config)
        )
        self.adamw: torch.optim.Optimizer = self.sharded.optimizer
        self.param_groups = self.adamw.param_groups
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

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state as one process would write it; all processes call this together."""
        from deepspeed.utils import safe_get_full_fp32_param

        rows: dict[int, dict[str, Tensor]] = {}
        if self.adamw.state:
            step = self.adamw.state[self.slices[0]]["step"]
            rows = {number: {"step": step.detach().clone().cpu()} for number in range(len(self.parameters))}
            for name in MOMENTS:
                # DeepSpeed gathers what stands in the place of the weights
                for part in self.slices:
                    part.data.copy_(self.adamw.state[part][name])
                for number, parameter in enumerate(self.parameters):
                    rows[number][name] = safe_get_full_fp32_param(parameter).cpu()
            self.sharded.refresh_fp32_params()
        settings = zip(self.param_groups, self.numbers, strict=True)
        return {"state": rows, "param_groups": [group | {"params": numbers} for group, numbers in settings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's share of what `state_dict`, here or of one process, returned; and of the weights, which
        must have been loaded into the module.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        if state["state"]:
            step = state["state"][0]["step"]
            for part in self.slices:
                self.adamw.state[part] = {"step": step.clone()}
            for name in MOMENTS:
                for number, parameter in enumerate(self.parameters):
                    safe_set_full_fp32_param(parameter, state["state"][number][name].to(parameter.device))
                for part in self.slices:
                    self.adamw.state[part][name] = part.detach().clone()
        self.sharded.refresh_fp32_params()


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a run; batches are accumulated by the training loop."""
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as everywhere else
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are averaged in float32, as without DeepSpeed
        },
    }
