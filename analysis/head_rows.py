"""Heads where an analysis knows layers: each head of each layer is one more of them, and back again."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr


def heads_as_layers(array: xr.DataArray) -> xr.DataArray:
    """(layer, row, head, feature) as (layer, row, feature), with the heads of a layer one after the other.

    `layer` and the head's coordinate, both along the new axis, say which one each is. The dimension and its
    coordinate keep their name (head, kv_head), which the attribute `heads` tells.
    """
    layers, _, heads, _ = array.shape
    name, values = str(array.dims[2]), array.data
    if isinstance(values, da.Array):
        parts = [values[layer : layer + 1, :, head] for layer in range(layers) for head in range(heads)]
        flat = da.concatenate(parts)
    else:
        flat = np.moveaxis(values, 2, 1).reshape(layers * heads, array.shape[1], array.shape[3])
    kept = {key: coord for key, coord in array.coords.items() if coord.dims == array.dims[1:2]}
    numbers = {
        dim: np.asarray(array[dim].values) if dim in array.coords else np.arange(array.sizes[dim])
        for dim in ("layer", name)
    }
    kept["layer"] = xr.DataArray(np.repeat(numbers["layer"], heads), dims="layer")
    result = xr.DataArray(flat, dims=("layer", array.dims[1], array.dims[3]), attrs=array.attrs)
    result = result.assign_coords({key: coord.variable for key, coord in kept.items()})
    return result.assign_coords({name: ("layer", np.tile(numbers[name], layers))}).assign_attrs(heads=name)


def split_heads(result: xr.Dataset, rows: xr.DataArray, *, prefix: str = "") -> xr.Dataset:
    """Undo `heads_as_layers` in what was computed from its rows: (layer, ...) becomes (layer, head, ...).

    Parameters
    ----------
    prefix
        Of both names, such as ``"other_"`` for the second layer of a comparison.
    """
    if "heads" not in rows.attrs:
        return result
    name, layer = str(rows.attrs["heads"]), f"{prefix}layer"
    head, numbers = f"{prefix}{name}", np.asarray(rows[name].values)
    heads = len(dict.fromkeys(numbers.tolist()))
    split = {
        key: _split(array.variable, layer, head, heads) if layer in array.dims else array
        for key, array in result.data_vars.items()
    }
    kept = {key: coord for key, coord in result.coords.items() if layer not in coord.dims}
    kept[layer] = xr.DataArray(np.asarray(rows["layer"].values)[::heads], dims=layer)
    kept[head] = xr.DataArray(numbers[:heads], dims=head)
    return xr.Dataset(split, kept, result.attrs)


def _split(variable: xr.Variable, layer: str, head: str, heads: int) -> xr.Variable:
    axis = variable.dims.index(layer)
    dims = (*variable.dims[: axis + 1], head, *variable.dims[axis + 1 :])
    values: Any = variable.data
    if isinstance(values, da.Array):
        # A reshape would join the blocks of the heads of a layer into one.
        pieces = [values[(slice(None),) * axis + (place,)] for place in range(values.shape[axis])]
        layers = [da.stack(pieces[first : first + heads], axis) for first in range(0, len(pieces), heads)]
        return xr.Variable(dims, da.stack(layers, axis), variable.attrs)
    shape = (*values.shape[:axis], values.shape[axis] // heads, heads, *values.shape[axis + 1 :])
    return xr.Variable(dims, values.reshape(shape), variable.attrs)
