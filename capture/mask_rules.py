"""Which keys a query may attend to, as a rule that can be written down, and proof that a model follows it.

A run keeps attention as q, k and one rule a layer. The rule is read off the boolean mask that the model
really used, and checked against it again in every batch; a mask that no rule explains is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .tap import AttentionCall

Columns = Mapping[str, NDArray[Any]]
Boolean = NDArray[np.bool_]


@dataclass(frozen=True)
class SequenceLayout:
    """What the mask of one sequence may depend on.

    `blocks` numbers each unbroken stretch of image tokens, -1 outside, whichever image or crop it shows.
    """

    blocks: NDArray[np.int16]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class MaskRule:
    """One of the format's mask rules; `window` counts the keys a query sees, itself included."""

    mask: str
    window: int | None = None

    def allowed(self, layout: SequenceLayout) -> Boolean:
        """Which keys each query may attend to: (query, key)."""
        number = np.arange(len(layout))
        behind = number[:, None] - number[None, :]
        causal: Boolean = behind >= 0
        if self.mask == "bidirectional":
            return np.ones_like(causal)
        if self.mask == "prefix":
            in_prompt: Boolean = causal | (number < layout.prompt_length)
            return in_prompt
        if self.mask.endswith("image_blocks"):
            causal |= (layout.blocks[:, None] == layout.blocks) & (layout.blocks >= 0)
        if self.window is not None:
            causal &= behind < self.window
        return causal


def find_rule(call: AttentionCall, layouts: Sequence[SequenceLayout], where: str) -> MaskRule:
    """The simplest rule that equals the model's own mask on every sequence of the batch.

    Raises
    ------
    CaptureError    no rule does.
    """
    observed = observed_masks(call, layouts)
    for rule in _candidates(call.window):
        if all(np.array_equal(rule.allowed(at), mask) for at, mask in zip(layouts, observed, strict=True)):
            return rule
    tried = ", ".join(rule.mask for rule in _candidates(call.window))
    raise CaptureError(
        f"{where}: no mask rule explains its mask (tried: {tried}).",
        "Its attention cannot be rebuilt from q and k: ask for resid_post and z of this stack instead.",
    )


def check_rule(rule: MaskRule, call: AttentionCall, layouts: Sequence[SequenceLayout], where: str) -> None:
    """CaptureError unless the mask of this batch is what the rule says."""
    for number, (at, mask) in enumerate(zip(layouts, observed_masks(call, layouts), strict=True)):
        if not np.array_equal(rule.allowed(at), mask):
            raise CaptureError(
                f"{where}: the mask of sequence {number} of a batch is not '{rule.mask}', as at attach.",
                "The model's mask depends on its input in a way that no rule covers; report this model.",
            )


def find_cross_rule(
    call: AttentionCall, queries: Sequence[Columns], keys: Sequence[Columns], where: str
) -> MaskRule:
    """The rule of cross-attention that equals the model's own mask on every sample of the batch.

    Raises
    ------
    CaptureError    neither does.
    """
    for rule in (MaskRule("cross"), MaskRule("cross_from")):
        if _is_cross(rule, call, queries, keys):
            return rule
    raise CaptureError(
        f"{where}: no mask rule explains the mask of its cross-attention (tried: cross, cross_from).",
        "Its attention cannot be rebuilt from xq and xk: ask for resid_post and xz of this stack instead.",
    )


def check_cross_rule(
    rule: MaskRule, call: AttentionCall, queries: Sequence[Columns], keys: Sequence[Columns], where: str
) -> None:
    """CaptureError unless the mask of this batch's cross-attention is what the rule says."""
    if not _is_cross(rule, call, queries, keys):
        raise CaptureError(
            f"{where}: the mask of its cross-attention is not '{rule.mask}', as at attach.",
            "The model's mask depends on its input in a way that no rule covers; report this model.",
        )


def _is_cross(
    rule: MaskRule, call: AttentionCall, queries: Sequence[Columns], keys: Sequence[Columns]
) -> bool:
    allowed = _one_head(call.allowed())
    for row, (of_query, of_key) in enumerate(zip(queries, keys, strict=True)):
        mask = allowed[row if allowed.shape[0] > 1 else 0, 0].cpu().numpy()
        mask = np.broadcast_to(mask, (call.query.shape[2], mask.shape[1]))
        expected = cross_allowed(rule, of_query["position"], of_key["first_query"])
        # Every key of the call is one of the sample's: none of another's is read.
        if not np.array_equal(mask[: len(expected)], expected):
            return False
    return True


def cross_allowed(rule: MaskRule, position: NDArray[Any], first_query: NDArray[Any]) -> Boolean:
    """Which keys each query may attend to: (query, key).

    Under ``cross_from`` a query reads the keys whose first query it is or follows; where there are none, all.
    """
    if rule.mask == "cross":
        return np.ones((len(position), len(first_query)), np.bool_)
    seen: Boolean = (first_query >= 0) & (first_query <= position[:, None])
    return seen | ~seen.any(1, keepdims=True)


def observed_masks(call: AttentionCall, layouts: Sequence[SequenceLayout]) -> list[Boolean]:
    """The mask of each sequence of the batch without its padding, which is on the right."""
    allowed = _one_head(call.allowed())
    rows = [allowed[i if allowed.shape[0] > 1 else 0, 0] for i in range(len(layouts))]
    return [row[: len(at), : len(at)].cpu().numpy() for row, at in zip(rows, layouts, strict=True)]


def _one_head(allowed: Tensor) -> Tensor:
    if allowed.shape[1] > 1 and not bool((allowed == allowed[:, :1]).all()):
        raise CaptureError(
            "the mask differs from head to head, which no mask rule covers.",
            "Ask for resid_post and z of this stack instead of q and k.",
        )
    return allowed


def _candidates(window: int | None) -> tuple[MaskRule, ...]:
    if window is not None:
        return (
            MaskRule("sliding_window", window),
            MaskRule("sliding_window_image_blocks", window),
            *_candidates(None),
        )
    names = ("causal", "bidirectional", "prefix", "causal_image_blocks")
    return tuple(MaskRule(name) for name in names)


def describe(rule: MaskRule, call: AttentionCall) -> dict[str, Any]:
    """What the attribute `attention` of q and k says about one layer."""
    return {
        "mask": rule.mask,
        "window": rule.window,
        "scale": call.scale,
        "softcap": call.softcap,
        "sinks": False if call.sinks is None else call.sinks.float().flatten().tolist(),
    }
