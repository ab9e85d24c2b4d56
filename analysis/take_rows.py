"""Take some rows of a lazy group: every stored block is cut as soon as it is read."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray


def take_rows(dataset: xr.Dataset, axis: str, rows: NDArray[Any]) -> xr.Dataset:
    """``dataset.isel({axis: rows})``, in bounded memory where the rows are in order.

    Dask's own selection holds pieces of many blocks at a time; here reading a block and cutting it is one
    task, and blocks without such rows are not read.
    """
    lazy = [n for n, v in dataset.variables.items() if axis in v.dims and isinstance(v.data, da.Array)]
    if not lazy or not rows.size or (np.diff(rows) < 0).any():
        return dataset.isel({axis: rows})
    rest = dataset.drop_vars(lazy)
    rest = rest.isel({axis: rows}) if axis in rest.dims else rest
    cut = {}
    for name in lazy:
        variable = dataset.variables[name]
        values = _cut(variable.data, variable.dims.index(axis), rows)
        cut[name] = xr.Variable(variable.dims, values, variable.attrs)
    return rest.assign(cut).set_coords([n for n in dataset.coords if n in cut])[list(dataset.variables)]


def _cut(array: da.Array, axis: int, rows: NDArray[Any]) -> da.Array:
    sizes = array.chunks[axis]
    starts = np.cumsum((0, *sizes))
    owner = np.searchsorted(starts, rows, side="right") - 1
    blocks, counts = np.unique(owner, return_counts=True)
    where = da.from_array(rows - starts[owner], chunks=(tuple(counts.tolist()),), name=False)
    dims = tuple(range(array.ndim))
    taken: da.Array = da.blockwise(
        _take,
        dims,
        array.blocks[(slice(None),) * axis + (blocks.tolist(),)],
        dims,
        where,
        (axis,),
        axis=axis,
        adjust_chunks={axis: where.chunks[0]},
        align_arrays=False,
        dtype=array.dtype,
        meta=array._meta,
    )
    joined: da.Array = taken.rechunk({axis: _joined(where.chunks[0], max(sizes))})
    return joined


def _take(values: NDArray[Any], rows: NDArray[Any], *, axis: int) -> NDArray[Any]:
    return values if len(rows) == values.shape[axis] else np.take(values, rows, axis)


def _joined(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Neighbours joined while they stay within `most` rows."""
    joined: list[int] = []
    for size in sizes:
        if joined and joined[-1] + size <= most:
            joined[-1] += size
        else:
            joined.append(size)
    return tuple(joined)
