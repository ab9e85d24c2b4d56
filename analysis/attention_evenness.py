"""How evenly each attention row is spread over the keys that it may look at: entropy on a scale of 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .allowed_keys import allowed_keys
from .attention_entropy import attention_entropy, entropy_statistic
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_weights import apply_to_pattern, attention_weights, pattern_of
from .blocks import MAX_BYTES

_ATTRS = {"units": "1", "long_name": "entropy of the attention row / log(keys)"}


@overload
def attention_evenness(
    attention: xr.DataTree | xr.Dataset,
    *,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset: ...
@overload
def attention_evenness(attention: ArrayLike) -> NDArray[Any]: ...
def attention_evenness(
    attention: Any,
    *,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Normalised entropy of each attention row (Pielou's evenness), J = H / log n, of n keys.

    Unlike the entropy, it can be compared between rows of unequal length, such as early and late tokens of a
    causal model.

    Parameters
    ----------
    attention
        A run (n counts the keys that the mask allows), a Dataset with attention_pattern (..., key), or a
        plain array or tensor (..., key), for which a numpy array (...) comes back; there n counts the keys
        that are not exactly 0.
    stack, tokens, layer, sample, max_bytes
        For a run, which rows: see `attention_statistics`.

    Returns
    -------
    attention_evenness (layer, token, head) of a run, (...) otherwise; float32, 0 to 1.
        0 for a row on one key, 1 for a uniform one; NaN where a query may look at fewer than two keys.

    Raises
    ------
    MissingSiteError  the run lacks q or k.
    DataError         NaN, or rows that are not weights; see also `attention_statistics`.
    DimensionError    no keys, no attention_pattern, or `key` in several chunks.

    References
    ----------
    Pielou (1966), Journal of Theoretical Biology 13, 131.
    """
    if isinstance(attention, xr.DataTree):
        return attention_statistics(
            attention,
            [evenness_statistic()],
            stack=stack,
            tokens=tokens,
            layer=layer,
            sample=sample,
            max_bytes=max_bytes,
        )
    if isinstance(attention, xr.Dataset):
        computed = apply_to_pattern(pattern_of(attention), _evenness, _ATTRS)
        return computed.to_dataset(name="attention_evenness")
    return _evenness(attention)


def evenness_statistic() -> RowStatistic:
    """The evenness as one statistic of a walk that computes several (`attention_statistics`)."""
    return RowStatistic({"attention_evenness": _ATTRS}, _evenness_of_rows)


def _evenness_of_rows(rows: AttentionRows) -> NDArray[Any]:
    entropy = entropy_statistic().kernel(rows)
    return _share_of_most(entropy, allowed_keys(rows).sum(axis=-1)[None, :, None])


def _evenness(values: Any) -> NDArray[Any]:
    weights = attention_weights(values)
    return _share_of_most(attention_entropy(weights), (weights > 0).sum(axis=-1))


def _share_of_most(entropy: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    most = np.log(np.where(keys > 1, keys, math.e).astype(entropy.dtype))
    # Rounding puts a uniform row a few ulp above log n.
    return np.where(keys > 1, np.minimum(entropy / most, 1), np.nan).astype(entropy.dtype)
