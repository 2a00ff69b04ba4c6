"""Keys and values that attention has computed, so that it need not compute them again for the next tokens.

Shapes: B batch, T tokens, D width.
"""

import torch


KeyValue = tuple[torch.Tensor, torch.Tensor]


class KeyValueCache:
    """Keys and values `(B, T, D)` of the tokens that one self-attention layer has seen so far."""

    def __init__(self) -> None:
        self.key_value: KeyValue | None = None

    @property
    def length(self) -> int:
        """Tokens seen, T."""
        return 0 if self.key_value is None else self.key_value[0].shape[1]

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Append the keys and values of new tokens; returns those of all tokens."""
        if self.key_value is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip(self.key_value, (key, value), strict=True))
        self.key_value = (key, value)
        return self.key_value

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make a batch of the given rows, in that order; a row may be repeated or left out."""
        if self.key_value is not None:
            key, value = self.key_value
            self.key_value = (key[rows], value[rows])
