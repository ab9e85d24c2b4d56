"""A component that says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Silenced:
    """Zeros in place of a tensor, or of one head of it (batch, token, head, d_head)."""

    head: int | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.head is None:
            return torch.zeros_like(tensor)
        silent = torch.arange(tensor.shape[-2], device=tensor.device) == self.head
        return tensor.masked_fill(silent[:, None], 0.0)
