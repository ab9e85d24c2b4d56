"""Linear centred kernel alignment (CKA): how alike two layers' representations of the same rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError

from .cka_products import PairSums, alignment, covariance_sums, gram_sums, layer_means
from .representation_rows import (
    MAX_BYTES,
    Representations,
    RowBlocks,
    layer_numbers,
    representation_rows,
    sample_numbers,
)


def linear_cka(
    first: Representations,
    second: Representations | None = None,
    *,
    debiased: bool = True,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    route: Literal["gram", "covariance"] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """CKA of every layer of `first` with every layer of `second`, or with each other; lazy.

    With centred rows X and Y, CKA = |X'Y|^2 / (|X'X| |Y'Y|), in Frobenius norms. That is biased upwards when
    rows are few against features; debiased, the unbiased estimator of HSIC takes the place of each norm.

    Parameters
    ----------
    first, second
        Two runs of the same samples, or arrays (layer, row, feature), see `representation_rows`.
    route
        Products of rows with rows (``"gram"``) or of features with features (``"covariance"``); both stream over
        blocks and give the same. None takes the cheaper one.

    Returns
    -------
    cka (layer, other_layer), float64: 1 for equal up to rotation and scale; 0 to 1, debiased also below 0.
    n_row (), int64.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  not (layer, row, feature).
    DataError       the rows of the two are not those of the same samples, or there are fewer than four; when
                    computed, a value that is not finite (by sample and layer), or a layer that is constant.

    References
    ----------
    Kornblith et al. (2019), ICML, arXiv:1905.00414. Song et al. (2012), Journal of Machine Learning Research 13,
    1393, equation 5.
    """
    left = representation_rows(first, site=site, tokens=tokens, layer=layer)
    itself = second is None or second is first
    right = left if itself else representation_rows(second, site=site, tokens=tokens, layer=layer)  # type: ignore[arg-type]
    _check_rows(left, right)
    if not itself:
        _check_samples(first, second, left, right)
    sums = _graph(left, right, itself, route or _cheaper(left, right), max_bytes)
    shape = (left.sizes["layer"], right.sizes["layer"])
    values = da.from_delayed(delayed(alignment)(sums, debiased, _names(left), _names(right)), shape, np.float64)
    attrs = {"long_name": "linear CKA" + (", debiased" if debiased else ""), "units": "1"}
    coords = {"layer": layer_numbers(left), "other_layer": layer_numbers(right)}
    result = xr.Dataset({"cka": (("layer", "other_layer"), values, attrs)}, coords)
    result["n_row"] = ((), np.int64(left.shape[1]), {"units": "row"})
    result.attrs = {"debiased": int(debiased)}
    if isinstance(first, xr.DataTree):
        result.attrs |= {"site": site, "tokens": tokens or "all"}
    return result if left.chunks is not None or right.chunks is not None else result.compute()


def _check_rows(left: xr.DataArray, right: xr.DataArray) -> None:
    if left.shape[1] != right.shape[1]:
        raise DataError(
            f"the first has {left.shape[1]} rows, the second {right.shape[1]}: they are not the same.",
            "Compare runs of the same samples, a token each (tokens='last'); leave out what one of them lacks.",
        )
    if left.shape[1] < 4:
        raise DataError(f"{left.shape[1]} rows are too few.", "CKA needs four at least, better hundreds.")


def _check_samples(first: Any, second: Any, left: xr.DataArray, right: xr.DataArray) -> None:
    """Rows must stand for the same samples: by their ids where both are runs, else by their numbers."""
    names = [_sample_ids(data, rows) for data, rows in ((first, left), (second, right))]
    if names[0] is None or names[1] is None:
        names = [
            sample_numbers(rows).astype(str) if "sample_index" in rows.coords else None for rows in (left, right)
        ]
    if names[0] is None or names[1] is None:
        return
    differ = np.flatnonzero(names[0] != names[1])
    if differ.size:
        at = int(differ[0])
        raise DataError(
            f"{differ.size} rows are not of the same sample: row {at} is {names[0][at]} in the first, "
            f"{names[1][at]} in the second.",
            "Select the same samples in the same order from both, as arrays: isel(sample=...).",
        )


def _sample_ids(data: Any, rows: xr.DataArray) -> NDArray[np.str_] | None:
    if not isinstance(data, xr.DataTree):
        return None
    samples = group(data, "samples")
    if "sample_id" not in samples.variables:
        return None
    return np.asarray(samples["sample_id"].values).astype(str)[sample_numbers(rows)]


def _names(rows: xr.DataArray) -> list[str]:
    return [f"layer {number}" for number in layer_numbers(rows)]


def _cheaper(left: xr.DataArray, right: xr.DataArray) -> Literal["gram", "covariance"]:
    """Multiplications: a Gram matrix for each layer, or a covariance for each pair of layers."""
    rows = left.shape[1]
    gram = rows**2 * (left.shape[0] * left.shape[2] + right.shape[0] * right.shape[2]) / 2
    covariance = rows * left.shape[2] * right.shape[2] * left.shape[0] * right.shape[0]
    return "gram" if gram <= covariance else "covariance"


def _graph(left: xr.DataArray, right: xr.DataArray, itself: bool, route: str, max_bytes: int) -> Any:
    """Delayed PairSums of all layers with all layers."""
    count = left.shape[1]
    widest = left.shape[0] * left.shape[2] + (0 if itself else right.shape[0] * right.shape[2])
    blocks = [_blocks(left, widest, max_bytes)] + ([] if itself else [_blocks(right, widest, max_bytes)])
    means = [delayed(layer_means)(part.all_layers(), part.context) for part in blocks]
    if route == "covariance":
        return _covariance_tasks(blocks, means)
    starts = blocks[0].starts
    total = None
    for one in range(len(starts) - 1):
        parts = []
        for two in range(one, len(starts) - 1):
            pairs = [(part.of_rows(one), part.of_rows(two) if two > one else None) for part in blocks]
            parts.append(delayed(gram_sums)(pairs, means, [part.context for part in blocks], (one, two)))
        total = delayed(PairSums.added)(parts, total)
    assert count == starts[-1]
    return total
