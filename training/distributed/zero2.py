"""DeepSpeed's ZeRO stage 2: every process has the whole weights, and a share of the gradients and of the optimiser.

DeepSpeed does the splitting and nothing else: weights stay float32 under autocast, every process keeps the running
average of all of them, and checkpoints hold whole tensors, the same files as those of one process.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from training.model.build import TrainingModel
from training.model.optimizer import build_optimizer
from training.settings.config import ConfigError, TrainConfig

from .engine import Engine, Step, spoiled_if_bad


# What AdamW keeps for each parameter besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")
# How many numbers are exchanged at once. DeepSpeed's own default would take 2 GB.
BUCKET = 50_000_000


def check_deepspeed(config: TrainConfig) -> None:
    """Refuse a run that needs DeepSpeed where DeepSpeed is not installed.

    Raises:
        ConfigError: if the run asks for DeepSpeed and it is not installed.
    """
    if config.sharding == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError('sharding=zero2 needs DeepSpeed: pip install -e ".[deepspeed]"')


class Zero2Engine(Engine):
    """DeepSpeed wraps the model and its AdamW. The parameters stay where they are and are changed in place."""

    def __init__(self, module: TrainingModel, config: TrainConfig, accelerator: Accelerator) -> None:
        super().__init__(module, config, accelerator)
        # otherwise DeepSpeed takes a GPU wherever there is one
        os.environ.setdefault("DS_ACCELERATOR", accelerator.device.type)
        import deepspeed

        optimizer = build_optimizer(module, config.optimizer)
        self.parameter_numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self.parameters = [value for group in optimizer.param_groups for value in group["params"]]
        self.model, self.sharded, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, dist_init_required=False, config=deepspeed_config(config)
        )
        self.optimizer: torch.optim.Optimizer = self.sharded.optimizer
        # AdamW steps these: for each parameter group a flat copy of this process's share of the weights.
        self.parts = [part for group in self.optimizer.param_groups for part in group["params"]]

    def accumulating(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate()  # DeepSpeed is told in `backward`; its own `no_sync` is not for ZeRO-2

    def backward(self, loss: Tensor) -> None:
        spoiled = spoiled_if_bad(loss / self.accelerator.gradient_accumulation_steps)
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(spoiled, scale_wrt_gas=False)

    def step(self, beside: Tensor | None = None) -> Step:
        self.model.step()  # clips and clears the gradients too, and waits for the device by itself
        norm = float(self.model.get_global_grad_norm())
        finite = math.isfinite(norm)  # if it is not, DeepSpeed has skipped the step
        return Step(norm, stepped=finite, good=finite, beside=[] if beside is None else beside.tolist())

    @contextmanager
    def _parts_lent(self) -> Iterator[list[Tensor]]:
        """The flat parts, to be filled with other numbers in the `with` block; then they hold the weights again."""
        try:
            yield self.parts
        finally:
            self.sharded.refresh_fp32_params()

    def whole_optimizer(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param

        rows: dict[int, dict[str, Tensor]] = {}
        if self.optimizer.state:
            step = self.optimizer.state[self.parts[0]]["step"].detach().cpu()
            rows = {number: {"step": step.clone()} for number in range(len(self.parameters))}
            # DeepSpeed has a function that gathers AdamW's moments, but until the second step it finds those of the
            # first group alone. So the moments are put in the place of the weights, and gathered as weights.
            with self._parts_lent() as parts:
                for name in MOMENTS:
                    for part in parts:
                        part.data.copy_(self.optimizer.state[part][name])
                    for number, parameter in enumerate(self.parameters):
                        gathered = safe_get_full_fp32_param(parameter)
                        if self.accelerator.is_main_process:
                            rows[number][name] = gathered.cpu()
        settings = zip(self.optimizer.param_groups, self.parameter_numbers, strict=True)
        return {"state": rows, "param_groups": [group | {"params": numbers} for group, numbers in settings]}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        rows = state["state"]
        with self._parts_lent() as parts:
            for group in self.optimizer.param_groups if rows else ():
                for part in group["params"]:
                    step = rows[0]["step"].clone()
                    self.optimizer.state[part] = {"step": step.to(part.device) if group["fused"] else step}
            for name in MOMENTS if rows else ():
                for number, parameter in enumerate(self.parameters):
                    safe_set_full_fp32_param(parameter, rows[number][name].to(parameter.device))
                for part in parts:
                    self.optimizer.state[part][name] = part.detach().clone()


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
            "lower_precision_safe_modules": [],  # so that gradients are averaged in float32, as without DeepSpeed
        },
        "timers": {"throughput": {"enabled": False}},  # the timer would wait for the GPU at every step
    }
