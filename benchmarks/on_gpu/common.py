"""What the parts share: device, sizes and the released code's place."""

import logging
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from transdiff_pipelines.presets import ModelSize, PublishedModel, published_model

from ..common.machine import matrix_product_rate
from ..common.parts import Deadline, Skip
from ..common.peers import Setting


TINY = ModelSize("tiny", width=32, num_attention_heads=2, encoder_layers=2, decoder_layers=1)
HALF = torch.bfloat16


@dataclass
class Shared:
    """What every part gets.

    Attributes:
        device: where to compute.
        tiny: whether this is a rehearsal, with models of one block.
        reference: checkout of the released code, or None.
        deadline: the end of the whole run.
        output: where the results go, without a suffix; folders that a part leaves begin with its name.
    """

    device: torch.device
    tiny: bool
    reference: Path | None
    deadline: Deadline
    output: Path = Path("gpu")

    @property
    def rounds(self) -> int:
        """Timed calls of each peer."""
        return 1 if self.tiny else 3

    def model(self, name: str) -> PublishedModel:
        """A published model, in a rehearsal with one block and few classes."""
        model = published_model(name)
        return replace(model, size=TINY, num_classes=100) if self.tiny else model

    def setting(self, name: str, batch_size: int, steps: int, compiled: str = "off") -> Setting:
        """A sampling setting in bfloat16; a rehearsal takes two steps and a batch of at most two."""
        if self.tiny:
            batch_size, steps = min(batch_size, 2), min(steps, 2)
        return Setting(self.model(name), batch_size, steps, HALF, compiled, self.device, self.tiny)

    @cached_property
    def rate(self) -> float:
        """Measured FLOP/s of large matrix products in bfloat16."""
        return matrix_product_rate(self.device, HALF)

    def released(self) -> Path:
        """The checkout of the released code.

        Raises:
            Skip: none was named.
        """
        if self.reference is None:
            raise Skip("there is no checkout of the released code: name one with --reference")
        return self.reference

    def memory_in_use(self) -> int:
        """Bytes of tensors on the device; 0 where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def be_quiet() -> None:
    """Leave the terminal to the parts: what libraries say of experimental features is not news here."""
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
