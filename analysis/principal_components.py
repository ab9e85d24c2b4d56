"""Principal components of each layer's rows, from covariances that one pass over the store accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .representation_rows import (
    MAX_BYTES,
    Representations,
    RowBlocks,
    finite_rows,
    layer_numbers,
    representation_rows,
    sample_numbers,
)

Floats = NDArray[np.float64]


def principal_components(
    data: Representations,
    *,
    components: int = 10,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """The directions of largest variance at each layer; lazy, every row is read once.

    Scores of rows are their projections: ``project_rows(run, pca["direction"], origin=pca["mean"])``.

    Returns
    -------
    direction (layer, component, feature), float32: of length 1, the largest loading positive.
    explained_variance (layer, component), float32: squared units of the site, over rows - 1.
    explained_share (layer, component), float32: of the total variance, 0 to 1.
    mean (layer, feature), float32, units of the site.
    n_row (), int64.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  not (layer, row, feature).
    DataError       fewer rows or features than components ask for; when computed, a value that is not finite
                    (by sample and layer), or a layer whose rows are all the same.

    References
    ----------
    Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, section 14.5.
    """
    rows = representation_rows(data, site=site, tokens=tokens, layer=layer)
    count, width = rows.shape[1:]
    most = min(count - 1, width)
    if not 1 <= components <= most:
        raise DataError(
            f"{components} components were asked of {count} rows with {width} features.",
            f"Ask for 1 to {most}." if most > 0 else "Capture more samples.",
        )
    blocks = RowBlocks(rows.data, max_bytes)
    samples, numbers = sample_numbers(rows), layer_numbers(rows)
    stacked = da.stack(
        [
            da.from_delayed(
                delayed(_components)(blocks.of(place), blocks.starts, samples, number, components),
                (components + 1, width + 2),
                np.float64,
            )
            for place, number in enumerate(numbers)
        ]
    ).astype(np.float32)
    feature, units = str(rows.dims[2]), str(rows.attrs.get("units", "1"))
    variance = {"units": f"({units})^2", "long_name": "variance along the component"}
    share = {"units": "1", "long_name": "share of the variance"}
    result = xr.Dataset(
        {
            "direction": (("layer", "component", feature), stacked[:, 1:, :width], {"units": "1"}),
            "explained_variance": (("layer", "component"), stacked[:, 1:, width], variance),
            "explained_share": (("layer", "component"), stacked[:, 1:, width + 1], share),
            "mean": (("layer", feature), stacked[:, 0, :width], {"units": units}),
            "n_row": ((), np.int64(count), {"units": "row"}),
        },
        {"layer": numbers, "component": np.arange(components)},
    )
    if isinstance(data, xr.DataTree):
        result.attrs = {"site": site, "tokens": tokens or "all"}
    return result if rows.chunks is not None else result.compute()


def _components(
    blocks: Sequence[Any], starts: Sequence[int], samples: NDArray[np.int64], number: int, components: int
) -> Floats:
    """Of one layer (1 + component, feature + 2): the mean, then components; then variance and its share."""
    opened = (
        finite_rows(block, samples[start:], number).astype(np.float64)
        for start, block in zip(starts, blocks, strict=False)
    )
    first = next(opened)
    width, count = first.shape[1], len(samples)
    # Fewer rows than features: their products with each other are the smaller matrix.
    if count <= width:
        mean, values, vectors, total = _from_rows(np.concatenate([first, *opened]), components)
    else:
        mean, values, vectors, total = _from_covariance(first, opened, components)
    if total <= 1e-24 * float(mean @ mean) * count:
        raise DataError(
            f"all rows of layer {number} are the same: there is no variance.",
            "Leave the layer out (layer=...), or choose tokens that differ between samples.",
        )
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1))
    packed = np.zeros((components + 1, width + 2))
    packed[0, :width] = mean
    packed[1:, :width] = vectors * signs
    packed[1:, width] = values / (count - 1)
    packed[1:, width + 1] = values / total
    return packed


def _from_rows(rows: Floats, components: int) -> tuple[Floats, Floats, Floats, float]:
    mean = rows.mean(axis=0)
    rows -= mean
    values, vectors = _largest(rows @ rows.T, components)
    found = vectors @ rows
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return mean, values, found / np.where(lengths > 0, lengths, 1), float(np.vdot(rows, rows))


def _from_covariance(first: Floats, others: Any, components: int) -> tuple[Floats, Floats, Floats, float]:
    # Products about a point near the mean lose no digits to it.
    centre = first.mean(axis=0)
    products = np.zeros((first.shape[1], first.shape[1]))
    total, count = np.zeros(first.shape[1]), 0
    for rows in _chained(first, others):
        rows -= centre
        products += rows.T @ rows
        total += rows.sum(axis=0)
        count += len(rows)
    shift = total / count
    products -= count * np.outer(shift, shift)
    values, vectors = _largest(products, components)
    return centre + shift, values, vectors, float(np.trace(products))


def _chained(first: Floats, others: Any) -> Any:
    yield first
    yield from others


def _largest(matrix: Floats, number: int) -> tuple[Floats, Floats]:
    """The largest eigenvalues (number,), descending, and their vectors (number, n)."""
    from scipy.linalg import eigh

    size = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=[size - number, size - 1], check_finite=False)
    return np.maximum(values[::-1], 0), vectors.T[::-1]
