"""How spread out each attention row is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_weights import apply_to_pattern, attention_weights, pattern_of
from .blocks import MAX_BYTES

_ATTRS = {"units": "nat", "long_name": "Shannon entropy of the attention row"}


@overload
def attention_entropy(
    attention: xr.DataTree | xr.Dataset,
    *,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset: ...
@overload
def attention_entropy(attention: ArrayLike) -> NDArray[Any]: ...
def attention_entropy(
    attention: Any,
    *,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Shannon entropy of each attention row, H = -sum_k p_k log p_k.

    Parameters
    ----------
    attention
        A run (weights are rebuilt from q and k), a Dataset with attention_pattern (..., key), or a plain
        array or tensor (..., key), for which a numpy array (...) comes back.
    stack, tokens, layer, sample, max_bytes
        For a run, which rows: see `attention_statistics`.

    Returns
    -------
    attention_entropy (layer, token, head) of a run, (...) otherwise; float32, nats.
        0 for a row on one key, log(n) for a uniform row of n keys; NaN where a query may look at no key.

    Raises
    ------
    MissingSiteError  the run lacks q or k.
    DataError         NaN, or rows that are not weights; see also `attention_statistics`.
    DimensionError    no keys, no attention_pattern, or `key` in several chunks.
    """
    if isinstance(attention, xr.DataTree):
        return attention_statistics(
            attention,
            [entropy_statistic()],
            stack=stack,
            tokens=tokens,
            layer=layer,
            sample=sample,
            max_bytes=max_bytes,
        )
    if isinstance(attention, xr.Dataset):
        return apply_to_pattern(pattern_of(attention), _entropy, _ATTRS).to_dataset(name="attention_entropy")
    return _entropy(attention)


def entropy_statistic() -> RowStatistic:
    """The entropy as one statistic of a walk that computes several (`attention_statistics`)."""
    return RowStatistic({"attention_entropy": _ATTRS}, _entropy_of_rows)


def _entropy_of_rows(rows: AttentionRows) -> NDArray[Any]:
    # With s the shifted logits and Z the sum of exp(s): -sum p log p = log Z - sum exp(s) s / Z.
    expected = np.einsum("hqk,hqk->hq", rows.exponentials, rows.scores) / rows.totals
    return np.asarray(np.maximum(np.log(rows.totals) - expected, 0)[..., None])


def _entropy(values: Any) -> NDArray[Any]:
    weights = attention_weights(values)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy: NDArray[Any] = -np.einsum("...k,...k->...", weights, logs)
    return np.asarray(np.maximum(entropy, 0))
