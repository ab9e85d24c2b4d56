"""Whether what an attention call shows is all that its attention is made of: shapes, and rebuilt rows."""

from __future__ import annotations

import torch

from mechanistic.store.errors import ModelError

from .anatomy import Stack
from .residual import relative_error
from .tap import AttentionCall


def check_shape(call: AttentionCall, stack: Stack, where: str) -> None:
    """ModelError unless heads are as configured and nothing is added to the scores of q and k."""
    got = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
    expected = (stack.heads, stack.kv_heads, stack.head_width)
    if got != expected:
        raise ModelError(
            f"{where}: heads, kv heads and head width are {got}, its configuration says {expected}.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    if call.position_bias is not None or _has_bias(call):
        raise ModelError(
            f"{where}: a position bias is added to its attention scores, which q and k do not hold.",
            "Models with relative position bias cannot be captured yet.",
        )


def rebuild(call: AttentionCall, stack: Stack, lengths: list[int]) -> tuple[float, float]:
    """How far rebuilt rows are from summing to 1, and rebuilt head outputs from the model's own.

    Parameters
    ----------
    lengths
        How many queries of each sequence of the batch are no padding.
    """
    row_sum_error = output_error = 0.0
    pattern = call.pattern()
    mixed = pattern @ call.value.float().repeat_interleave(stack.heads // stack.kv_heads, dim=1)
    for row, length in enumerate(lengths):
        valid = slice(length)
        if call.sinks is None:
            sums = pattern[row, :, valid].sum(-1)
            row_sum_error = max(row_sum_error, float((sums - 1).abs().max()))
        error = relative_error(mixed[row].transpose(0, 1)[valid], call.output[row, valid])
        output_error = max(output_error, error)
    return row_sum_error, output_error


def _has_bias(call: AttentionCall) -> bool:
    """Whether an additive mask does more than open and close."""
    if call.mask is None or call.mask.dtype == torch.bool:
        return False
    return bool((call.mask[call.mask > torch.finfo(call.mask.dtype).min / 2] != 0).any())
