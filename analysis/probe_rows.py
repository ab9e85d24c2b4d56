"""The rows that a probe reads: one array (layer, row, feature) or (layer, row, head, feature), and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group, sites
from mechanistic.store import site as site_of
from mechanistic.store.errors import DimensionError

from .splits import with_samples
from .token_selection import select_tokens


def probe_rows(
    data: xr.DataTree | xr.Dataset, columns: Sequence[str], site: str, tokens: str | None
) -> xr.Dataset:
    """The chosen tokens of a site with these columns of their samples, their set and status; lazy."""
    if isinstance(data, xr.Dataset):
        return data
    # The last prompt token, the commonest read, has a small group of its own where it was captured.
    name = f"{site}_last" if tokens == "last" and f"{site}_last" in sites(data) else site
    rows = site_of(data, name)
    if name == site:
        rows = select_tokens(rows, tokens)
    held = group(data, "samples").variables
    wanted = [*columns, *(name for name in ("group", "status") if name in held and name not in columns)]
    return with_samples(rows, data, [name for name in wanted if name not in rows.variables])


def probe_features(rows: xr.Dataset) -> xr.DataArray:
    """The one array of activations.

    Raises
    ------
    DimensionError  there is none, or several, or it has other dimensions.
    """
    arrays = [array for array in rows.data_vars.values() if array.dtype.kind == "f" and "layer" in array.dims]
    if len(arrays) != 1 or arrays[0].ndim not in (3, 4) or arrays[0].dims[0] != "layer":
        shapes = ", ".join(f"{array.name} {tuple(array.dims)}" for array in arrays) or "none"
        raise DimensionError(
            "a probe reads one array (layer, row, feature) or (layer, row, head, feature); "
            f"these data have {shapes}.",
            "Choose a site of residuals or of heads, such as 'text/resid_post' or 'text/z'.",
        )
    return arrays[0]


def with_units(features: xr.DataArray, rows: NDArray[np.int64]) -> Any:
    """Some rows as a dask array (layer, row, unit, feature): a unit is a head; there is one without heads."""
    chosen = features if len(rows) == features.shape[1] else features.isel({features.dims[1]: rows})
    values = chosen.data
    if not isinstance(values, da.Array):
        # A name of its own: hashing the values to name them would cost as much as their products.
        values = da.from_array(_Held(values), chunks=(1, *(-1,) * (values.ndim - 1)), name=False)
    return values[:, :, None] if values.ndim == 3 else values


class _Held:
    """An array in memory that dask slices in place; of a numpy array it makes a copy first."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim

    def __getitem__(self, place: Any) -> NDArray[Any]:
        return np.asarray(self.values[place])
