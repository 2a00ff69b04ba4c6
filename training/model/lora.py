"""LoRA adapters in training: added to frozen networks, and written as a file that `pipe.load_lora_weights` reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
from peft.utils import get_peft_model_state_dict
from torch import nn

from training.settings.config import LATENT_PARTS, ConfigError, LoraConfig
from transdiff_pipelines import TransDiffPipeline


ADAPTER = "default"


def add_adapters(built: nn.Module, lora: LoraConfig, frozen: list[str]) -> list[str]:
    """Freeze both networks and give those not named in `frozen` adapters to train; returns a line for each.

    Raises:
        ConfigError: if a target is the end of no linear layer's name.
    """
    built.requires_grad_(False)
    notes = []
    for part in (part for part in LATENT_PARTS if part not in frozen):
        network = getattr(built, part)
        check_targets(network, part, lora.targets)
        network.add_adapter(
            peft.LoraConfig(
                r=lora.rank,  # type: ignore[arg-type]
                lora_alpha=lora.alpha or lora.rank,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
            ),
            adapter_name=ADAPTER,
        )
        count = sum(parameter.requires_grad for parameter in network.parameters()) // 2
        notes.append(f"LoRA of rank {lora.rank} on {count} layers of {part}; all else is frozen")
    return notes


def check_targets(network: nn.Module, part: str, targets: list[str]) -> None:
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            kinds = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linears})
            raise ConfigError(f"lora.targets names {target!r}, which {part} does not have; it has {', '.join(kinds)}")


def save_adapters(built: nn.Module, folder: Path) -> None:
    """Write the adapters of both networks to one file in `folder`, with their rank and alpha."""
    arguments: dict[str, Any] = {}
    for part in LATENT_PARTS:
        network = getattr(built, part)
        if getattr(network, "peft_config", None):
            arguments[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
            arguments[f"{part}_lora_adapter_metadata"] = network.peft_config[ADAPTER].to_dict()
    TransDiffPipeline.save_lora_weights(folder, **arguments)
