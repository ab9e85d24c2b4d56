"""Exact attention rows of one observed call, a block of queries at a time, on the model's own device.

The scores of a whole sequence, (head, query, key), are never held: a block has as many queries as fit into
`block_bytes_on` its device. Layers that never look ahead are multiplied only up to the last of those queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tap import AttentionCall

# On a CPU a block that stays in its cache is 2.4 times faster; an accelerator wants few large ones.
CPU_BLOCK_BYTES = 1 << 20
DEVICE_BLOCK_BYTES = 64 << 20

# Finite, so that 0 * MASKED is 0 and not NaN in sum p log p; exp of it is exactly 0.
MASKED = -1e30


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one sequence: `scores` are logits less their row's maximum, or about MASKED.

    scores, exponentials (head, row, key), float32; totals (head, row), what the exponentials are divided by:
    their sum and, in a layer with a sink, the sink's own. NaN where a query may look at no key.
    """

    rows: slice
    scores: Tensor
    exponentials: Tensor
    totals: Tensor

    @property
    def weights(self) -> Tensor:
        """The attention weights (head, row, key)."""
        return self.exponentials / self.totals[..., None]


def row_blocks(
    call: AttentionCall,
    sequence: int,
    queries: Tensor,
    keys: int,
    *,
    ahead: bool,
    block_bytes: int | None = None,
) -> Iterator[RowBlock]:
    """Rebuild the rows of `queries` of one sequence of the batch over its first `keys` keys.

    Parameters
    ----------
    queries
        Their places on the query axis, ascending, on the host.
    ahead
        Whether a query may look at keys behind its own place; if not, key i is query i's own.
    """
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    key = call.key[sequence, :, :keys].float().transpose(1, 2).contiguous()
    limit = block_bytes_on(call.query.device) if block_bytes is None else block_bytes
    height = max(1, limit // (4 * heads * max(1, keys)))
    for start in range(0, len(queries), height):
        rows = slice(start, min(start + height, len(queries)))
        places = queries[rows]
        stop = keys if ahead else min(keys, int(places[-1]) + 1)
        on_device = places.to(call.query.device)
        query = call.query[sequence].index_select(1, on_device).float() * call.scale
        grouped = query.reshape(kv_heads, -1, query.shape[-1])
        scores = (grouped @ key[..., :stop]).reshape(heads, len(places), stop)
        if call.softcap is not None:
            scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        scores = _masked(scores, call, sequence, on_device)
        yield _normalised(rows, scores, call.sinks)


def block_bytes_on(device: torch.device) -> int:
    """How many bytes of scores a block may have."""
    return CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES


def _masked(scores: Tensor, call: AttentionCall, sequence: int, queries: Tensor) -> Tensor:
    stop = scores.shape[-1]
    if call.position_bias is not None:
        bias = call.position_bias
        bias = bias[min(sequence, bias.shape[0] - 1)].index_select(1, queries.to(bias.device))
        scores = scores + bias[..., :stop].float().to(scores.device)
    if call.mask is None:
        if not call.causal or call.query.shape[2] == 1:
            return scores
        behind = call.key.shape[2] - call.query.shape[2]
        allowed = torch.arange(stop, device=scores.device) <= (queries + behind)[:, None]
        return scores.masked_fill_(~allowed, MASKED)
    mask = call.mask[min(sequence, call.mask.shape[0] - 1)]
    mask = mask.index_select(1, queries.to(mask.device))[..., :stop].to(scores.device)
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, MASKED)
    closed = mask <= torch.finfo(mask.dtype).min / 2
    return scores.add_(mask.float()).masked_fill_(closed, MASKED)


def _normalised(rows: slice, scores: Tensor, sinks: Tensor | None) -> RowBlock:
    highest = scores.amax(-1, keepdim=True)
    nothing = highest[..., 0] <= MASKED / 2
    if sinks is not None:
        sink = sinks.float().reshape(-1, 1, 1)
        highest = torch.maximum(highest, sink)
    scores = scores.sub_(highest)
    exponentials = scores.exp()
    totals = exponentials.sum(-1)
    if sinks is not None:
        totals = totals + (sink - highest).exp()[..., 0]
    return RowBlock(rows, scores, exponentials, totals.masked_fill(nothing, torch.nan))
