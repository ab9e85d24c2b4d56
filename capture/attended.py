"""What an attention module did in one run, from which its weights are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .attention_rows import row_blocks
from .tap import AttentionCall


@dataclass
class Attended:
    """One run of an attention module: what it was called with, or the weights that it gave itself."""

    calls: list[AttentionCall] = field(default_factory=list)
    weights: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether the module ran to its end."""
        return bool(self.calls) or self.weights is not None

    @property
    def source_dtype(self) -> str:
        """The dtype that the model attended in."""
        seen = self.calls[0].query if self.calls else self.weights
        assert seen is not None
        return str(seen.dtype).removeprefix("torch.")

    def pattern(self) -> Tensor:
        """(batch, head, query, key), float32; NaN in the rows of queries that may look at no key.

        An encoder that attends to its tokens in several calls gives the blocks of one pattern, 0 elsewhere.
        """
        if self.weights is not None:
            return self.weights.float()
        blocks = [_weights(call) for call in self.calls]
        if len(blocks) == 1:
            return blocks[0]
        batch, heads = blocks[0].shape[:2]
        if any(block.shape[:2] != (batch, heads) for block in blocks):
            raise CaptureError(
                f"{type(self.calls[0].module).__name__} attends in calls of different batches.",
                "This architecture needs an adapter; capture q and k of another stack.",
            )
        whole = blocks[0].new_zeros(batch, heads, *(sum(b.shape[d] for b in blocks) for d in (2, 3)))
        query = key = 0
        for block in blocks:
            whole[:, :, query : query + block.shape[2], key : key + block.shape[3]] = block
            query, key = query + block.shape[2], key + block.shape[3]
        return whole


def _weights(call: AttentionCall) -> Tensor:
    """(batch, head, query, key) of one call."""
    queries, keys = torch.arange(call.query.shape[2]), call.key.shape[2]
    rows = [
        torch.cat([block.weights for block in row_blocks(call, sequence, queries, keys, ahead=True)], dim=1)
        for sequence in range(call.query.shape[0])
    ]
    return torch.stack(rows)
