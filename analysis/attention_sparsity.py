"""How sparse each attention row is, by a standard measure: Gini, Hoyer, or keys for most of the mass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import SpecificationError

from .allowed_keys import allowed_keys
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_weights import apply_to_pattern, attention_weights, pattern_of
from .blocks import MAX_BYTES

Measure = Literal["gini", "hoyer", "key_share"]

_MEANINGS = {
    "gini": "Gini index of the attention row",
    "hoyer": "Hoyer sparsity of the attention row",
    "key_share": "share of the keys that hold most of the attention row",
}


@overload
def attention_sparsity(
    attention: xr.DataTree | xr.Dataset,
    *,
    measure: Measure = "gini",
    mass: float = 0.9,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset: ...
@overload
def attention_sparsity(
    attention: ArrayLike, *, measure: Measure = "gini", mass: float = 0.9
) -> NDArray[Any]: ...
def attention_sparsity(
    attention: Any,
    *,
    measure: Measure = "gini",
    mass: float = 0.9,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Sparsity of each attention row over the n keys that its query may look at.

    With p sorted downwards, p_1 >= p_2 >= ... >= p_n:
    gini = 1 - 2 sum_j p_j (j - 1/2) / n;
    hoyer = (sqrt(n) - 1 / |p|_2) / (sqrt(n) - 1);
    key_share = (smallest m with p_1 + ... + p_m >= `mass`) / n, which falls as a row gets sparser.
    In a layer with attention sinks, p is what the keys get, divided by its sum.

    Parameters
    ----------
    attention
        A run, a Dataset with attention_pattern (..., key), or a plain array or tensor (..., key), for which a
        numpy array (...) comes back. Without a run every key counts, also those that a mask has set to 0.
    stack, tokens, layer, sample, max_bytes
        For a run, which rows: see `attention_statistics`.

    Returns
    -------
    attention_gini, attention_hoyer or attention_key_share (layer, token, head) of a run, (...) otherwise;
        float32, 0 to 1. A uniform row has 0, 0 and about `mass`; a row on one key has 1 - 1/n, 1 and 1/n. NaN
        where a query may look at no key; hoyer also where it may look at only one.

    Raises
    ------
    SpecificationError  another measure, or a mass that is not above 0 and below 1.
    MissingSiteError    the run lacks q or k.
    DataError           NaN, or rows that are not weights; see also `attention_statistics`.
    DimensionError      no keys, no attention_pattern, or `key` in several chunks.

    References
    ----------
    Hurley and Rickard (2009), IEEE Transactions on Information Theory 55, 4723; Hoyer (2004), Journal of
    Machine Learning Research 5, 1457.
    """
    statistic = sparsity_statistic(measure, mass)
    if isinstance(attention, xr.DataTree):
        return attention_statistics(
            attention,
            [statistic],
            stack=stack,
            tokens=tokens,
            layer=layer,
            sample=sample,
            max_bytes=max_bytes,
        )
    kernel = partial(_sparsity, measure=measure, mass=mass)
    if isinstance(attention, xr.Dataset):
        [(name, attrs)] = statistic.variables.items()
        return apply_to_pattern(pattern_of(attention), kernel, dict(attrs)).to_dataset(name=name)
    return kernel(attention_weights(attention))


def sparsity_statistic(measure: Measure = "gini", mass: float = 0.9) -> RowStatistic:
    """The sparsity as one statistic of a walk that computes several (`attention_statistics`)."""
    if measure not in _MEANINGS:
        raise SpecificationError(
            f"There is no measure of sparsity {measure!r}.", f"The measures are {', '.join(_MEANINGS)}."
        )
    if not 0 < mass < 1:
        raise SpecificationError(f"mass is {mass}.", "Give a share of the row, such as mass=0.9.")
    attrs: dict[str, Any] = {"units": "1", "long_name": _MEANINGS[measure]}
    if measure == "key_share":
        attrs["mass"] = mass
    kernel = partial(_sparsity_of_rows, measure=measure, mass=mass)
    return RowStatistic({f"attention_{measure}": attrs}, kernel)


def _sparsity_of_rows(rows: AttentionRows, measure: Measure, mass: float) -> NDArray[Any]:
    keys = np.broadcast_to(allowed_keys(rows).sum(axis=-1), rows.totals.shape)
    shares = rows.exponentials / rows.sums[..., None]
    return measured_sparsity(shares, keys, measure, mass)[..., None]


def _sparsity(weights: NDArray[Any], measure: Measure, mass: float) -> NDArray[Any]:
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return measured_sparsity(weights, np.full(weights.shape[:-1], weights.shape[-1]), measure, mass)


def measured_sparsity(
    weights: NDArray[Any], keys: NDArray[Any], measure: Measure, mass: float
) -> NDArray[Any]:
    """One number a row of shares; `keys` says how many of them are allowed, the rest being 0."""
    count = np.where(keys > 0, keys, np.nan).astype(weights.dtype)
    if measure == "hoyer":
        norm = np.sqrt(np.einsum("...k,...k->...", weights, weights))
        root = np.sqrt(np.where(keys > 1, count, np.nan))
        return np.asarray(np.clip((root - 1 / norm) / (root - 1), 0, 1))
    # Upwards, so that keys that are not allowed stand first and drop out of both sums.
    ordered = np.sort(weights, axis=-1)[..., ::-1]
    if measure == "gini":
        places = np.arange(weights.shape[-1], dtype=weights.dtype) + np.float32(0.5)
        return np.asarray(np.clip(1 - 2 * (ordered @ places) / count, 0, 1))
    reached = np.cumsum(ordered, axis=-1, dtype=np.float64) >= mass - 1e-6
    # Half-precision rows may sum to less than `mass` asks for; then it takes all keys.
    needed = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, keys)
    return np.asarray(needed / count)
