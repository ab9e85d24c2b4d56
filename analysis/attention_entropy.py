"""How spread out each attention row is, in nats or as a share of what its number of keys allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .allowed_keys import allowed_keys
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_weights import apply_to_pattern, attention_weights, pattern_of
from .blocks import MAX_BYTES

_ENTROPY = {"units": "nat", "long_name": "Shannon entropy of the attention row"}
_NORMALIZED = {"units": "1", "long_name": "entropy of the attention row / log(keys)"}


@overload
def attention_entropy(
    attention: xr.DataTree | xr.Dataset,
    *,
    normalize: bool = False,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset: ...
@overload
def attention_entropy(attention: ArrayLike, *, normalize: bool = False) -> NDArray[Any]: ...
def attention_entropy(
    attention: Any,
    *,
    normalize: bool = False,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Shannon entropy of each attention row, H = -sum_k p_k log p_k; normalised, H / log n of n keys.

    Normalised (Pielou's evenness), rows of unequal length can be compared, such as those of early and late
    tokens of a causal model.

    Parameters
    ----------
    attention
        A run (weights are rebuilt from q and k, or else attn_stats read; n counts the keys that the mask
        allows), a Dataset with attention_pattern (..., key), or a plain array or tensor (..., key), for which
        a numpy array (...) comes back; there n counts the keys that are not exactly 0.
    normalize
        Divide by log n. In a layer with attention sinks, p is then divided by its sum first.
    stack, cross, tokens, layer, sample, max_bytes
        For a run, which rows: see `attention_statistics`.

    Returns
    -------
    attention_entropy (layer, token, head) of a run, (...) otherwise; float32, nats.
        0 for a row on one key, log(n) for a uniform row of n keys; NaN where a query may look at no key.
    normalized_entropy instead, with `normalize`; float32, 0 to 1.
        0 for a row on one key, 1 for a uniform one; NaN where a query may look at fewer than two keys.

    Raises
    ------
    MissingSiteError  the run lacks q or k, and attn_stats do not hold just this.
    DataError         NaN, or rows that are not weights; see also `attention_statistics`.
    DimensionError    no keys, no attention_pattern, or `key` in several chunks.

    References
    ----------
    Pielou (1966), Journal of Theoretical Biology 13, 131.
    """
    statistic = entropy_statistic(normalize=normalize)
    if isinstance(attention, xr.DataTree):
        return attention_statistics(
            attention,
            [statistic],
            stack=stack,
            cross=cross,
            tokens=tokens,
            layer=layer,
            sample=sample,
            max_bytes=max_bytes,
        )
    kernel = partial(_entropy, normalize=normalize)
    if isinstance(attention, xr.Dataset):
        [(name, attrs)] = statistic.variables.items()
        return apply_to_pattern(pattern_of(attention), kernel, dict(attrs)).to_dataset(name=name)
    return kernel(attention_weights(attention))


def entropy_statistic(*, normalize: bool = False) -> RowStatistic:
    """The entropy as one statistic of a walk that computes several (`attention_statistics`)."""
    if normalize:
        return RowStatistic({"normalized_entropy": _NORMALIZED}, _normalized_of_rows)
    return RowStatistic({"attention_entropy": _ENTROPY}, _entropy_of_rows)


def _entropy_of_rows(rows: AttentionRows) -> NDArray[Any]:
    # With s the shifted logits and Z the sum of exp(s): -sum p log p = log Z - sum exp(s) s / Z.
    expected = np.vecdot(rows.exponentials, rows.scores) / rows.totals
    held = 1 if rows.sums is rows.totals else np.nan_to_num(rows.sums) / rows.totals
    return np.asarray(np.maximum(held * np.log(rows.totals) - expected, 0)[..., None])


def _normalized_of_rows(rows: AttentionRows) -> NDArray[Any]:
    among_keys = _entropy_of_rows(replace(rows, totals=rows.sums))
    return _share_of_most(among_keys, allowed_keys(rows).sum(axis=-1)[None, :, None])


def _entropy(weights: NDArray[Any], *, normalize: bool) -> NDArray[Any]:
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy = np.maximum(-np.einsum("...k,...k->...", weights, logs), 0)
    return _share_of_most(entropy, (weights > 0).sum(axis=-1)) if normalize else np.asarray(entropy)


def _share_of_most(entropy: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    most = np.log(np.where(keys > 1, keys, math.e).astype(entropy.dtype))
    # Rounding puts a uniform row a few ulp above log n.
    return np.where(keys > 1, np.minimum(entropy / most, 1), np.nan).astype(entropy.dtype)
