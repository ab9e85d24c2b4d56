"""Attributions of one or several samples as one labelled table, the rows of a sample after one another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import DimensionError

Labels = Mapping[str, NDArray[Any]]


def attribution_table(
    values: Mapping[str, Sequence[NDArray[Any]]],
    labels: Sequence[Labels],
    *,
    dim: str,
    of_sample: Mapping[str, ArrayLike],
    attrs: Mapping[str, Mapping[str, Any]],
) -> xr.Dataset:
    """A Dataset with the dimensions `dim` (labelled rows) and `sample`.

    Parameters
    ----------
    values
        By variable, one array (row,) for each sample.
    labels
        The columns of a token table, one for each sample.
    of_sample
        By variable or coordinate, one value for each sample; sample_id, target and layer become coordinates.
    attrs
        By variable.
    """
    variables: dict[str, Any] = {
        name: (dim, np.concatenate(parts), dict(attrs.get(name, {}))) for name, parts in values.items()
    }
    coords: dict[str, Any] = {
        name: (dim, np.concatenate([table[name] for table in labels])) for name in labels[0]
    }
    for name, each in of_sample.items():
        column = np.asarray(each)
        text = column.dtype.kind in "US"
        place = coords if name in ("sample_id", "target", "layer") else variables
        place[name] = ("sample", column.astype(object) if text else column, dict(attrs.get(name, {})))
    return xr.Dataset(variables, coords)


def model_attributes(loaded: Any) -> dict[str, str]:
    """What made an attribution: the model, as far as it is known without reading its weights."""
    return {
        "model": loaded.name,
        "repository": loaded.repository,
        "revision": loaded.revision,
        "architecture": type(loaded.model).__name__,
        "dtype": loaded.dtype,
    }


def attribution_of(dataset: xr.Dataset) -> xr.DataArray:
    """The attribution of a Dataset, which has the name of the analysis that made it.

    Raises
    ------
    DimensionError    there is none.
    """
    name = dataset.attrs.get("analysis")
    if name not in dataset.data_vars:
        raise DimensionError(
            f"no attribution that is known is among {', '.join(map(str, dataset.data_vars))}.",
            "Pass the variable itself: data['NAME'].",
        )
    return dataset[name]


def sample_row(attribution: xr.DataArray, sample: int) -> xr.DataArray:
    """The values of one sample, by its sample_index."""
    return attribution.isel({attribution.dims[-1]: attribution["sample_index"].values == sample})
