"""Means over the token rows of each sample, or of any groups of rows within samples, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .blocks import sample_spans
from .token_selection import token_axis

_PIECE = 256


def sample_means(dataset: xr.Dataset) -> xr.Dataset:
    """Average the token rows of each sample; lazy.

    Returns
    -------
    the variables with a token axis, that axis replaced by `sample`, one entry for each sample that has rows;
    `sample_index` says which. NaN where any row is NaN.

    Raises
    ------
    DimensionError  there is no token axis.
    DataError       the rows are not in dataset order.
    """
    axis = token_axis(dataset)
    spans = sample_spans(np.asarray(dataset["sample_index"].values))
    groups = Groups(np.arange(dataset.sizes[axis]), spans.start, spans.start)
    variables = {}
    for name, variable in dataset.data_vars.items():
        if axis not in variable.dims:
            continue
        place = variable.dims.index(axis)
        dims = tuple("sample" if dim == axis else dim for dim in variable.dims)
        variables[name] = (dims, mean_of_groups(variable.data, place, groups), variable.attrs)
    coords = {name: coord for name, coord in dataset.coords.items() if axis not in coord.dims}
    result = xr.Dataset(variables, coords, dataset.attrs)
    return result.assign_coords(sample_index=("sample", spans.sample.astype(np.int32)))


@dataclass(frozen=True)
class Groups:
    """Rows to average: those of a group lie together in `order`, from each `start` to the next.

    `order` moves rows within samples only, which begin at `samples`.
    """

    order: NDArray[np.int64]
    start: NDArray[np.int64]
    samples: NDArray[np.int64]


def mean_of_groups(values: Any, place: int, groups: Groups) -> Any:
    """Means over the rows of each group, on axis `place`."""
    if not isinstance(values, da.Array):
        return _reduce_groups(np.asarray(values), groups.order, groups.start, place)
    dtype = np.result_type(values.dtype, np.float32)
    edges = np.cumsum((0, *values.chunks[place][:-1]))
    # A block ends where the sample ends that its last row belongs to.
    firsts = np.unique(np.searchsorted(groups.samples, edges, side="left"))
    row_edges = np.append(groups.samples[firsts[firsts < len(groups.samples)]], values.shape[place])
    group_edges = np.searchsorted(groups.start, row_edges)
    rows, counts = (tuple(np.diff(ends).tolist()) for ends in (row_edges, group_edges))
    order = groups.order - np.repeat(row_edges[:-1], rows)
    start = groups.start - np.repeat(row_edges[:-1], counts)
    dims = tuple(range(values.ndim))
    return da.blockwise(
        partial(_reduce_groups, place=place),
        dims,
        values.rechunk({place: rows}),
        dims,
        da.from_array(order, chunks=(rows,), name=False),
        (place,),
        da.from_array(start, chunks=(counts,), name=False),
        (place,),
        adjust_chunks={place: counts},
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0,) * values.ndim, dtype),
    )


def _reduce_groups(
    values: NDArray[Any], order: NDArray[np.int64], start: NDArray[np.int64], place: int
) -> NDArray[Any]:
    dtype = np.result_type(values.dtype, np.float32)
    before, after = values.shape[:place], values.shape[place + 1 :]
    rows = values.reshape(math.prod(before), values.shape[place], math.prod(after)).astype(dtype, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = _sums(rows, order, start)
        if dtype != np.float64 and not np.isfinite(sums).all():
            # Something is missing, or single precision does not hold the sum.
            sums = _sums(rows.astype(np.float64), order, start)
        means = sums / np.diff(start, append=len(order))[:, None]
        return np.asarray(means, dtype).reshape(*before, len(start), *after)


def _sums(rows: NDArray[Any], order: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums (before, group, after) of rows (before, row, after).

    Of `_PIECE` rows at most in their own precision, as a product with a sparse matrix, which takes a tenth of
    the time of reduceat; of these in double.
    """
    from scipy.sparse import csr_array

    counts = np.diff(start, append=len(order))
    pieces = -(-counts // _PIECE)
    first = np.cumsum(pieces) - pieces
    begin = np.repeat(start - _PIECE * first, pieces) + _PIECE * np.arange(pieces.sum())
    members = csr_array(
        (np.ones(len(order), rows.dtype), order, np.append(begin, len(order))), (len(begin), len(order))
    )
    parts = np.empty((rows.shape[0], len(begin), rows.shape[2]), rows.dtype)
    for place, part in enumerate(rows):
        parts[place] = members @ part
    return np.add.reduceat(parts, first, axis=1, dtype=np.float64)
