"""Edits of an encoder's tensors, with its tokens counted end to end, over the crops of all samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mechanistic.store.errors import CaptureError

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class OverCrops:
    """A change of (copy, token, ...) made to a tensor (crop, token of the crop, ...).

    `tokens` are those of one copy.
    """

    change: Change
    tokens: int

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.shape[:2].numel() % self.tokens:
            raise CaptureError(
                f"The encoder computes {tensor.shape[:2].numel()} tokens, where {self.tokens} are labelled.",
                "Its tokens cannot be told apart; report this model.",
            )
        return self.change(tensor.reshape(-1, self.tokens, *tensor.shape[2:])).reshape(tensor.shape)


@dataclass(frozen=True, eq=False)
class Between:
    """A change of scores such as CloseKeys, of some `heads` (head,) from queries to keys (token,), boolean.

    `change` makes it from the scores chosen; `start` is the first token of the encoder that is there.
    """

    query: Tensor
    key: Tensor
    heads: Tensor
    change: Callable[[Tensor], Change]
    start: int = 0

    def piece(self, start: int, tokens: int) -> Between:
        """The change of the scores of some tokens, where an encoder attends to them in pieces."""
        return replace(self, start=start)

    def __call__(self, scores: Tensor) -> Tensor:
        crops, _, size, _ = scores.shape
        here = slice(self.start, self.start + crops * size)
        query, key = (each[here].reshape(crops, size) for each in (self.query, self.key))
        chosen = query[:, None, :, None] & key[:, None, None, :] & self.heads[:, None, None]
        return self.change(chosen)(scores)
