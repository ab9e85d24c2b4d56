"""Edits of path patching: a sender takes its corrupt value in a copy of its own; all else is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Puts `corrupt` (sample, token, ...) in the copies of `senders`, (copy, head or None for all of it).

    Everything else of the tensor (copy * sample, token, ...) becomes `clean`; without `clean` it stays as the
    model computed it. `where` (sample, token) are the tokens whose value is sent.
    """

    corrupt: Tensor
    where: Tensor
    senders: tuple[tuple[int, int | None], ...]
    clean: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        size = len(self.where)
        copies = len(tensor) // size
        if self.clean is None:
            sent = tensor.clone()
        else:
            sent = self.clean.to(tensor.device, tensor.dtype).repeat(copies, *[1] * (tensor.ndim - 1))
        where = self.where.to(tensor.device)
        corrupt = self.corrupt.to(tensor.device, tensor.dtype)
        for copy, head in self.senders:
            rows = sent[copy * size : (copy + 1) * size]
            if head is None:
                rows[where] = corrupt[where]
            else:
                rows[..., head, :][where] = corrupt[..., head, :][where]
        return sent


@dataclass(frozen=True)
class Received:
    """Puts one head of `values` (copy * sample, token, head, d_head) in place."""

    values: Tensor
    head: int

    def __call__(self, tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[..., self.head, :] = self.values[..., self.head, :].to(tensor.device, tensor.dtype)
        return changed
