"""Which patches may attend to each other in an image encoder, and proof that they do.

An encoder attends within segments: one crop of one image, one window of it, or a whole image with all its
crops. Each segment comes as a row of the batch, or as a call of its own; inside it every token sees every
other, but padding does not see padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError

from .mask_rules import MaskRule
from .tap import AttentionCall
from .token_table import Columns

_PLACES = ("sample_index", "image_index", "tile", "patch_row", "patch_col")
# Of a whole image: the tokens that belong to no crop of it are padding.
PADDED = "padded_image"


def encoder_rule(config: Any, layer: int) -> MaskRule:
    """The rule of a layer by the encoder's configuration; the masks of every forward are held against it."""
    if hasattr(config, "num_global_layers"):
        return MaskRule(PADDED)
    full = getattr(config, "fullatt_block_indexes", None)
    if full is None or layer in full:
        return MaskRule("per_image")
    return MaskRule("image_windows", config.window_size // config.patch_size)


class EncoderMasks:
    """Follows the attention calls of one forward over all encoder tokens of a batch, in their order."""

    def __init__(self, tables: Sequence[Columns]) -> None:
        self._places = {name: np.concatenate([table[name] for table in tables]) for name in _PLACES}
        self._segments: dict[MaskRule, NDArray[np.int64]] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def check(self, rule: MaskRule, call: AttentionCall, layer: int, stack: str = "vision") -> None:
        """CaptureError unless every row of this call is a whole segment of the rule and open inside."""
        segments = self.segments(rule)
        rows, _, tokens, _ = call.query.shape
        open_inside = call.mask is None and not (call.causal and tokens > 1)
        if rule.mask != PADDED and not open_inside and not bool(call.allowed().all()):
            raise self._error(rule, layer, "some of its tokens may not attend to each other")
        for row in range(rows):
            start = self._seen.get(key := (stack, layer), 0)
            self._seen[key] = start + tokens
            if not _is_whole(segments, start, start + tokens):
                raise self._error(rule, layer, f"tokens {start} to {start + tokens - 1} are not one segment")
            if rule.mask == PADDED and not self._padded(call, row, start):
                raise self._error(rule, layer, "it is not only padding that padding does not attend to")

    def _padded(self, call: AttentionCall, row: int, start: int) -> bool:
        """Whether the mask of one image closes padding to padding, and nothing else."""
        allowed = call.allowed()
        here: NDArray[np.bool_] = allowed[row if allowed.shape[0] > 1 else 0].all(0).cpu().numpy()
        padding = self._places["tile"][start : start + call.query.shape[2]] < 0
        return np.array_equal(np.broadcast_to(here, (len(padding),) * 2), ~(padding[:, None] & padding))

    def segments(self, rule: MaskRule) -> NDArray[np.int64]:
        """The number of each token's segment, which grows from 0 in the order of the tokens."""
        if rule not in self._segments:
            names = _PLACES[: 2 if rule.mask == PADDED else 3]
            columns = [self._places[name].astype(np.int64) for name in names]
            if rule.window is not None:
                columns += [self._places[name].astype(np.int64) // rule.window for name in _PLACES[3:]]
            places = np.stack(columns, axis=1)
            changes = (places[1:] != places[:-1]).any(1)
            numbers = np.concatenate([[0], np.cumsum(changes)]) if len(places) else np.zeros(0, np.int64)
            if len(places) and len(np.unique(places, axis=0)) != numbers[-1] + 1:
                raise CaptureError(
                    f"The encoder does not see the tokens of each '{rule.mask}' segment in a row.",
                    "Labels and model do not belong together; report this model.",
                )
            self._segments[rule] = numbers
        return self._segments[rule]

    def _error(self, rule: MaskRule, layer: int, what: str) -> CaptureError:
        return CaptureError(
            f"vision.{layer}: its attention is not '{rule.mask}', as its configuration says: {what}.",
            "Its attention cannot be rebuilt from q and k: ask for resid_post and z of this stack instead.",
        )


def _is_whole(segments: NDArray[np.int64], start: int, end: int) -> bool:
    """Whether a stretch of tokens is exactly one segment."""
    if end > len(segments) or len(set(segments[start:end].tolist())) != 1:
        return False
    bounded = [segments[at] != segments[start] for at in (start - 1, end) if 0 <= at < len(segments)]
    return all(bounded)
