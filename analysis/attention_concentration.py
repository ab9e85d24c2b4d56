"""How much of each attention row its few strongest keys hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import SpecificationError

from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_weights import apply_to_pattern, attention_weights, pattern_of
from .blocks import MAX_BYTES


@overload
def attention_concentration(
    attention: xr.DataTree | xr.Dataset,
    *,
    k: int = 5,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset: ...
@overload
def attention_concentration(attention: ArrayLike, *, k: int = 5) -> NDArray[Any]: ...
def attention_concentration(
    attention: Any,
    *,
    k: int = 5,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Attention mass on the k strongest keys of each row, C = sum of the k largest p.

    Parameters
    ----------
    attention
        A run (weights are rebuilt from q and k, or else attn_stats read), a Dataset with attention_pattern
        (..., key), or a plain array or tensor (..., key), for which a numpy array (...) comes back.
    stack, cross, tokens, layer, sample, max_bytes
        For a run, which rows: see `attention_statistics`.

    Returns
    -------
    attention_concentration (layer, token, head) of a run, (...) otherwise; float32, share of the row.
        k/n for a uniform row of n keys; 1 where k keys or fewer are allowed; NaN where none is.

    Raises
    ------
    SpecificationError  k is below 1.
    MissingSiteError    the run lacks q or k, and attn_stats do not hold just this.
    DataError           NaN, or rows that are not weights; see also `attention_statistics`.
    DimensionError      no keys, no attention_pattern, or `key` in several chunks.
    """
    statistic = concentration_statistic(k)
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
    kernel = partial(_largest, k=k)
    if isinstance(attention, xr.Dataset):
        attrs = dict(statistic.variables["attention_concentration"])
        return apply_to_pattern(pattern_of(attention), kernel, attrs).to_dataset(
            name="attention_concentration"
        )
    return kernel(attention_weights(attention))


def concentration_statistic(k: int = 5) -> RowStatistic:
    """The top-k mass as one statistic of a walk that computes several (`attention_statistics`)."""
    if k < 1:
        raise SpecificationError(f"k is {k}.", "Count at least one key: k=5.")
    attrs = {"units": "1", "long_name": f"attention mass on the {k} strongest keys", "k": k}
    return RowStatistic({"attention_concentration": attrs}, partial(_concentration_of_rows, k=k))


def _concentration_of_rows(rows: AttentionRows, k: int) -> NDArray[Any]:
    return (_largest(rows.exponentials, k) / rows.totals)[..., None]


def _largest(values: NDArray[Any], k: int) -> NDArray[Any]:
    """Sum of the k largest entries of each row."""
    if k < values.shape[-1]:
        values = np.partition(values, -k, axis=-1)[..., -k:]
    return np.asarray(values.sum(axis=-1))
