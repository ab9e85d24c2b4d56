"""Call a kernel on each stored block of rows: nothing is copied, and reading a block is the same task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .finite import require_finite
from .representation_rows import layer_numbers, row_chunks, sample_numbers


def map_rows(
    kernel: Callable[..., NDArray[Any]],
    rows: xr.DataArray,
    *labels: xr.DataArray,
    into: str,
    size: int,
    dtype: Any = np.float32,
) -> xr.DataArray:
    """Rows (layer, row, ..., feature) as (layer, row, ..., `into`); lazy where they are.

    apply_ufunc would copy every block before it calls the kernel.

    Parameters
    ----------
    kernel
        (values, layer numbers, sample numbers, *labels) -> values whose last axis has `size` entries.
    labels
        What the kernel needs besides: those of its rows and layers, and every other dimension whole.
    """
    dims = [str(dim) for dim in rows.dims]
    numbers = xr.DataArray(np.asarray(layer_numbers(rows)), dims=dims[0])
    samples = xr.DataArray(sample_numbers(rows), dims=dims[1])
    given = [numbers, samples, *(label.reset_coords(drop=True) for label in labels)]
    result: Any
    if isinstance(rows.data, da.Array):
        result = _map_blocks(kernel, row_chunks(rows.data), dims, given, size, np.dtype(dtype))
    else:
        result = kernel(rows.values, *(label.values for label in given))
    coords = {name: coord for name, coord in rows.coords.items() if dims[-1] not in coord.dims}
    return xr.DataArray(result, coords, (*dims[:-1], into))


def _map_blocks(
    kernel: Callable[..., NDArray[Any]],
    values: da.Array,
    dims: list[str],
    labels: list[xr.DataArray],
    size: int,
    dtype: np.dtype[Any],
) -> da.Array:
    places = {dim: place for place, dim in enumerate(dims)}
    arguments: list[Any] = []
    for label in labels:
        index = tuple(places.setdefault(str(dim), len(places)) for dim in label.dims)
        chunks = tuple(values.chunks[axis] if axis < 2 else -1 for axis in index)
        if isinstance(label.data, da.Array):
            arguments += [label.data.rechunk(chunks), index]
        else:
            # A name of its own: hashing the numbers takes longer than cutting them.
            arguments += [da.from_array(label.values, chunks, name=False), index]
    axes = tuple(range(values.ndim))
    mapped: da.Array = da.blockwise(
        kernel,
        axes,
        values,
        axes,
        *arguments,
        adjust_chunks={axes[-1]: size},
        align_arrays=False,
        concatenate=True,
        dtype=dtype,
        meta=np.empty((0,) * values.ndim, dtype),
    )
    return mapped


def finite_values(rows: xr.DataArray) -> xr.DataArray:
    """The same values, lazily, but DataError instead of any that is NaN or infinite."""
    name = str(rows.dims[-1])
    kept = map_rows(_finite_kernel, rows, into=name, size=rows.shape[-1], dtype=rows.dtype)
    return rows.copy(data=kept.data)


def _finite_kernel(values: NDArray[Any], layer: NDArray[Any], sample: NDArray[Any]) -> NDArray[Any]:
    require_finite(values, sample, np.expand_dims(layer, 1))
    return values
