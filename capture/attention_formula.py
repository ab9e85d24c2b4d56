"""Attention as a formula: scores, and the weights that they become. For what no fast kernel shows."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_scores(
    query: Tensor, key: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> Tensor:
    """What the softmax is taken of, before the mask: (batch, head, query, key), float32.

    Keys are (batch, kv_head, key, d_head); each serves the query heads of its group.
    """
    key = repeat_heads(key, query.shape[1]).float()
    scores = query.float() @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias.float()


def attention_weights(scores: Tensor, allowed: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of the scores over the allowed keys, and over the sinks, which are left out of the result.

    A key with a score of minus infinity is closed; a query whose keys are all closed attends to nothing.
    """
    closed = ~allowed | (scores == -torch.inf)
    # The lowest finite value: minus infinity in every key of a row would make its gradient NaN.
    scores = scores.masked_fill(closed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].masked_fill(closed, 0.0)
    return scores.softmax(-1).masked_fill(closed, 0.0)


def repeat_heads(values: Tensor, heads: int) -> Tensor:
    """Keys or values (batch, kv_head, key, d_head) repeated to as many heads as queries have."""
    return values.repeat_interleave(heads // values.shape[1], dim=1)
