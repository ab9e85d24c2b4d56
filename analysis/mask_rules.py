"""Which keys a query may look at, and how its logits are made: the rule a run records for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import FormatError
from mechanistic.store.schema import KIND

Columns = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]

_COLUMNS = ("position", "kind", "image_index", "tile", "patch_row", "patch_col", "first_query")


def mask_columns(tokens: xr.Dataset) -> tuple[str, ...]:
    """The labels of these tokens that the rules below read."""
    return tuple(name for name in _COLUMNS if name in tokens.variables)


@dataclass(frozen=True)
class AttentionRule:
    """How one layer turns q and k into attention: softmax of softcap(scale * q.k) over the keys of `mask`.

    `window` is the number of keys a sliding window reaches back, the query's own included, or the side in
    patches of an image window; `softcap` c squashes logits to c * tanh(logit / c). `sinks` (head,) are logits
    that take part in the softmax and belong to no key, so that a row of weights sums to less than 1.
    """

    mask: str
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: NDArray[np.float32] | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, recorded: Mapping[str, Any], where: str) -> AttentionRule:
        """Read what a run recorded for one layer.

        Raises
        ------
        FormatError  the mask is unknown, a window is missing or surplus, there are sinks but not their
                     logits, or a key is not known: each would give attention that is not the model's.
        """
        unknown = sorted(set(recorded) - {"mask", "scale", "window", "softcap", "sinks"})
        if unknown:
            raise FormatError(
                f"{where}: the attention rule has {', '.join(unknown)}, which is not known here.",
                "Upgrade: pip install --upgrade mechanistic.",
            )
        mask, scale, window = recorded.get("mask"), recorded.get("scale"), recorded.get("window")
        if mask not in _RULES or not isinstance(scale, int | float):
            raise FormatError(
                f"{where}: the attention rule is mask {mask!r} with scale {scale!r}.",
                f"A rule has a numeric scale and one of these masks: {', '.join(_RULES)}.",
            )
        windowed = mask in _WINDOWED
        if windowed != (window is not None) or (window is not None and int(window) < 1):
            raise FormatError(
                f"{where}: mask {mask!r} with window {window!r}.",
                f"A window, at least 1, belongs to these masks and no others: {', '.join(_WINDOWED)}.",
            )
        softcap = recorded.get("softcap")
        return cls(
            mask,
            float(scale),
            None if window is None else int(window),
            None if softcap is None else float(softcap),
            _sinks(recorded.get("sinks"), where),
        )

    def of_heads(self, places: Sequence[int] | NDArray[Any]) -> AttentionRule:
        """The rule of some heads, by their places in `sinks`."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[np.asarray(places)])

    def allowed(self, query: Columns, key: Columns) -> Mask:
        """Whether each query (row) may look at each key (column), both of one sample.

        `key` must hold every token of the sample in order; blocks of image tokens are found from it.
        """
        return _RULES[self.mask](query, key, self.window or 0)

    def key_stop(self, query: Columns, key: Columns) -> int:
        """How many leading keys cover everything that these queries may look at."""
        if self.mask not in _NEVER_AHEAD:
            return len(key["position"])
        return int(np.searchsorted(key["position"], query["position"].max(), side="right"))


def read_rules(
    recorded: Mapping[str, Any], layers: NDArray[Any], heads: NDArray[Any], where: str
) -> dict[int, AttentionRule]:
    """The rule of each layer, from the `attention` attribute of a q group, whose path is `where`.

    `heads` are the true numbers of the query heads held, whose sinks are kept.

    In the vision encoder a sequence is one crop of one image, so "bidirectional" there is "per_image" on the
    axis of all patches of a sample.

    Raises
    ------
    FormatError  a layer has no rule, or one that `AttentionRule.parse` refuses, or too few sinks.
    """
    rules = {}
    for layer in map(int, layers):
        if str(layer) not in recorded:
            raise FormatError(
                f"{where} has no attention rule for layer {layer}, only for {', '.join(recorded) or 'none'}.",
                "Its attribute `attention` must name mask and scale of every layer: capture the run again.",
            )
        rule = AttentionRule.parse(recorded[str(layer)], f"{where}, layer {layer}")
        if rule.mask == "bidirectional" and where.startswith("vision/"):
            rule = replace(rule, mask="per_image")
        if rule.sinks is not None and len(rule.sinks) <= heads.max(initial=-1):
            raise FormatError(
                f"{where}, layer {layer}: {len(rule.sinks)} sinks, and a head {heads.max()}.",
                "`sinks` must have the logit of every query head of the model: capture the run again.",
            )
        rules[layer] = rule.of_heads(heads)
    return rules


def _sinks(recorded: Any, where: str) -> NDArray[np.float32] | None:
    if not recorded and recorded != []:
        return None
    sinks = np.asarray(recorded, object)
    if sinks.ndim != 1 or not all(isinstance(value, int | float) and np.isfinite(value) for value in sinks):
        raise FormatError(
            f"{where}: this layer has attention sinks, whose logits are not in the run.",
            "Capture it again: `sinks` must have one number for each query head.",
        )
    return sinks.astype(np.float32)


def _causal(query: Columns, key: Columns, window: int) -> Mask:
    return np.asarray(key["position"][None, :] <= query["position"][:, None])


def _everything(query: Columns, key: Columns, window: int) -> Mask:
    return np.ones((len(query["position"]), len(key["position"])), bool)


def _prefix(query: Columns, key: Columns, window: int) -> Mask:
    in_prompt: Mask = _causal(query, key, window) | (key["kind"] != KIND["answer"])[None, :]
    return in_prompt


def _within_window(query: Columns, key: Columns, window: int) -> Mask:
    return np.asarray(key["position"][None, :] > query["position"][:, None] - window)


def _sliding_window(query: Columns, key: Columns, window: int) -> Mask:
    return _causal(query, key, window) & _within_window(query, key, window)


def _causal_image_blocks(query: Columns, key: Columns, window: int) -> Mask:
    """Gemma 3 numbers each unbroken stretch of image tokens, whichever image or crop it shows."""
    image = key["kind"] == KIND["image"]
    starts = image & ~np.concatenate([[False], image[:-1]])
    of_query, of_key = _numbered(query, key, np.where(image, np.cumsum(starts), -1))
    blocks: Mask = _causal(query, key, window) | (of_query == of_key) & (of_query >= 0)
    return blocks


def _sliding_window_image_blocks(query: Columns, key: Columns, window: int) -> Mask:
    """The window also cuts image blocks that are longer than it, as transformers 5.23 does."""
    return _causal_image_blocks(query, key, window) & _within_window(query, key, window)


def _per_image(query: Columns, key: Columns, window: int) -> Mask:
    """A sequence is one crop of one image; what belongs to no tile, such as CLS, leads its crop's."""
    image, tile = key["image_index"], key["tile"]
    starts = (image[1:] != image[:-1]) | ((tile[1:] != tile[:-1]) & (tile[:-1] >= 0))
    of_query, of_key = _numbered(query, key, np.concatenate([[0], np.cumsum(starts)]))
    return np.asarray(of_query == of_key)


def _image_windows(query: Columns, key: Columns, window: int) -> Mask:
    inside = _per_image(query, key, window)
    for column in ("patch_row", "patch_col"):
        inside &= query[column][:, None] // window == key[column][None, :] // window
    return inside


def _padded_image(query: Columns, key: Columns, window: int) -> Mask:
    """A sequence is a whole image; padding, which is in no tile, does not look at padding."""
    same = query["image_index"][:, None] == key["image_index"][None, :]
    return np.asarray(same & ~((query["tile"][:, None] < 0) & (key["tile"][None, :] < 0)))


def _cross_from(query: Columns, key: Columns, window: int) -> Mask:
    """Keys are read from some query on; a query that may read none of them reads all."""
    first = key["first_query"][None, :]
    seen = (first >= 0) & (first <= query["position"][:, None])
    return np.asarray(seen | ~seen.any(1, keepdims=True))


def _numbered(query: Columns, key: Columns, number: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The keys' numbers for queries (a column) and keys (a row); queries may be a few of the tokens."""
    return number[np.searchsorted(key["position"], query["position"])][:, None], number[None, :]


_RULES: dict[str, Callable[[Columns, Columns, int], Mask]] = {
    "causal": _causal,
    "bidirectional": _everything,
    "prefix": _prefix,
    "causal_image_blocks": _causal_image_blocks,
    "sliding_window": _sliding_window,
    "sliding_window_image_blocks": _sliding_window_image_blocks,
    "image_windows": _image_windows,
    "per_image": _per_image,
    "padded_image": _padded_image,
    "cross": _everything,
    "cross_from": _cross_from,
}
_WINDOWED = ("sliding_window", "sliding_window_image_blocks", "image_windows")
_NEVER_AHEAD = ("causal", "sliding_window")
