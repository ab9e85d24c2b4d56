"""Linear centred kernel alignment (CKA): how alike two layers' representations of the same rows are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError

from .cka_products import alignment, covariance_product, gram_tile, summarize_layer
from .head_rows import split_heads
from .representation_rows import (
    BLOCK_ROWS,
    MAX_BYTES,
    Representations,
    RowBlocks,
    UnreadBlock,
    layer_numbers,
    representation_rows,
    sample_numbers,
)
from .splits import row_labels


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
        Two runs of the same samples, or arrays (layer, row[, head], feature), see `representation_rows`.
    route
        Products of rows with rows (``"gram"``) or of features with features (``"covariance"``); both stream
        over blocks and give the same. None takes the cheaper one.

    Returns
    -------
    cka (layer[, head], other_layer[, other_head]), float64: 1 for equal up to rotation and scale; 0 to 1,
        debiased also below 0.
    n_row (), int64.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  not (layer, row[, head], feature).
    DataError       the rows of the two are not those of the same samples, or there are fewer than four; when
                    computed, a value that is not finite (by sample and layer), or a layer that is constant.

    References
    ----------
    Kornblith et al. (2019), ICML, arXiv:1905.00414. Song et al. (2012), Journal of Machine Learning Research
    13, 1393, equation 5.
    """
    left = representation_rows(first, site=site, tokens=tokens, layer=layer, heads=True)
    itself = second is None or second is first
    right = left
    if second is not None and not itself:
        right = representation_rows(second, site=site, tokens=tokens, layer=layer, heads=True)
        _check_samples(first, second, left, right)
    _check_rows(left, right)
    layers = _layers(left, max_bytes) + ([] if itself else _layers(right, max_bytes))
    firsts, seconds = left.shape[0], 0 if itself else right.shape[0]
    summaries = [layer.summary() for layer in layers]
    products = _products(layers, summaries, firsts, route or _cheaper(left, right), max_bytes)
    aligned = delayed(alignment)(products, summaries, firsts, seconds, debiased)
    values = da.from_delayed(aligned, (left.shape[0], right.shape[0]), np.float64)
    attrs = {"long_name": "linear CKA" + (", debiased" if debiased else ""), "units": "1"}
    coords = {"layer": layer_numbers(left), "other_layer": layer_numbers(right)}
    result = xr.Dataset({"cka": (("layer", "other_layer"), values, attrs)}, coords)
    result = split_heads(split_heads(result, left), right, prefix="other_")
    result["n_row"] = ((), np.int64(left.shape[1]), {"units": "row"})
    result.attrs = {"debiased": int(debiased)}
    if isinstance(first, xr.DataTree):
        result.attrs |= {"site": site, "tokens": tokens or "all"}
    return result if left.chunks is not None or right.chunks is not None else result.compute()


def _check_rows(left: xr.DataArray, right: xr.DataArray) -> None:
    if left.shape[1] != right.shape[1]:
        raise DataError(
            f"the first has {left.shape[1]} rows, the second {right.shape[1]}: they are not the same.",
            "Compare runs of the same samples, a token each (tokens='last'); leave out what one lacks.",
        )
    if left.shape[1] < 4:
        raise DataError(f"{left.shape[1]} rows are too few.", "CKA needs four at least, better hundreds.")


def _check_samples(first: Any, second: Any, left: xr.DataArray, right: xr.DataArray) -> None:
    """Rows must stand for the same samples: by their ids where both are runs, else by their numbers."""
    names = [_sample_ids(data, rows) for data, rows in ((first, left), (second, right))]
    if names[0] is None or names[1] is None:
        names = [
            sample_numbers(rows).astype(str) if "sample_index" in rows.coords else None
            for rows in (left, right)
        ]
    if names[0] is None or names[1] is None or len(names[0]) != len(names[1]):
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
    return row_labels(samples["sample_id"])[sample_numbers(rows)]


def _cheaper(left: xr.DataArray, right: xr.DataArray) -> Literal["gram", "covariance"]:
    """Multiplications: a Gram matrix for each layer, or a covariance for each pair of layers."""
    rows = left.shape[1]
    gram = rows**2 * (left.shape[0] * left.shape[2] + right.shape[0] * right.shape[2]) / 2
    covariance = rows * left.shape[2] * right.shape[2] * left.shape[0] * right.shape[0]
    return "gram" if gram <= covariance else "covariance"


def _products(layers: list[_Layer], summaries: list[Any], firsts: int, route: str, max_bytes: int) -> Any:
    """A lazy or delayed matrix (layer, layer) of |X'Y|^2."""
    if route == "gram":
        return _gram_products(layers, summaries, max_bytes)
    size = len(layers)
    # Layers of one run are compared with layers of the other, and each with itself, but not with each other.
    wanted = [
        (a, b) for a in range(size) for b in range(a, size) if a == b or firsts == size or a < firsts <= b
    ]
    table: list[list[Any]] = [[np.nan] * size for _ in range(size)]
    for a, b in wanted:
        task = delayed(covariance_product)(
            layers[a].blocks(), None if a == b else layers[b].blocks(), summaries[a], summaries[b]
        )
        table[a][b] = table[b][a] = task
    return delayed(np.array)(table)


def _gram_products(layers: list[_Layer], summaries: list[Any], max_bytes: int) -> Any:
    """Tiles of rows with rows, as large as all layers' tiles together allow; read layer by layer."""
    count = layers[0].count
    tile = int(np.clip(np.sqrt(max_bytes / 2 / (8 * len(layers))), 32, BLOCK_ROWS))
    starts = [*range(0, count, tile), count]
    tiles = []
    for one, (start, stop) in enumerate(pairwise(starts)):
        firsts = [layer.span(start, stop) for layer in layers]
        tiles.append(delayed(gram_tile)(firsts, None, summaries))
        for begin, end in list(pairwise(starts))[one + 1 :]:
            seconds = [layer.span(begin, end) for layer in layers]
            tiles.append(delayed(gram_tile)(firsts, seconds, summaries))
    return delayed(sum)(tiles)


class _Layer:
    """The rows of one layer of one run."""

    def __init__(self, rows: xr.DataArray, blocks: RowBlocks, place: int) -> None:
        self.count = rows.shape[1]
        self._number, self._samples = layer_numbers(rows)[place], sample_numbers(rows)
        self._blocks, self._place = blocks, place

    def blocks(self) -> list[Any]:
        return self._blocks.of(self._place)

    def span(self, start: int, stop: int) -> Any:
        """Some rows, read by the task that gets them."""
        return UnreadBlock(self._blocks.values[self._place : self._place + 1, start:stop])

    def summary(self) -> Any:
        return delayed(summarize_layer)(self.blocks(), self._blocks.starts, self._samples, self._number)


def _layers(rows: xr.DataArray, max_bytes: int) -> list[_Layer]:
    blocks = RowBlocks(rows.data, max_bytes)
    return [_Layer(rows, blocks, place) for place in range(rows.shape[0])]
