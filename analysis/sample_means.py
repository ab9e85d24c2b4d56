"""Means over the token rows of each sample, or of any groups of rows within samples, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .blocks import sample_spans
from .token_selection import token_axis


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
    if (np.diff(order) != 1).any():
        values = np.take(values, order, axis=place)
    counts = np.diff(np.append(start, values.shape[place]))
    shape = [1] * values.ndim
    shape[place] = -1
    sums = np.add.reduceat(values, start, axis=place, dtype=np.float64)
    return np.asarray(sums / counts.reshape(shape)).astype(np.result_type(values.dtype, np.float32))
