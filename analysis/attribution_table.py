"""Attributions of one or several samples as one labelled table, the rows of a sample after one another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError

from .sweep import Sweep

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class SampleAttribution:
    """Of one sample: `values` (row,) by variable, the columns of a token table that label them, what there is
    once, and what is no column."""

    values: Arrays
    labels: Arrays
    of_sample: Mapping[str, Any]
    beside: Arrays = field(default_factory=dict)

    def packed(self) -> dict[str, Any]:
        """All of it by names of one kind."""
        return {f"{part}/{name}": each for part, held in vars(self).items() for name, each in held.items()}

    @classmethod
    def unpacked(cls, arrays: Arrays) -> SampleAttribution:
        """From what `packed` gave."""
        parts: dict[str, dict[str, Any]] = {each.name: {} for each in fields(cls)}
        for name, values in arrays.items():
            part, _, own = name.partition("/")
            parts[part][own] = values
        return cls(**parts)


def attribute_each(
    sweep: Sweep, samples: Sequence[Any], attribute: Callable[[Any, int], SampleAttribution], *, quiet: bool
) -> list[SampleAttribution]:
    """Every sample, with its number, attributed in a step of its own."""

    def packed(sample: Any, place: int) -> dict[str, Any]:
        return attribute(sample, place).packed()

    with sweep.steps(len(samples), quiet=quiet, unit="samples") as step:
        found = [step(partial(packed, sample, place)) for place, sample in enumerate(samples)]
    return [SampleAttribution.unpacked(each) for each in found]


def attribution_table(
    found: Sequence[SampleAttribution], *, dim: str, attrs: Mapping[str, Mapping[str, Any]]
) -> xr.Dataset:
    """A Dataset with the dimensions `dim` (labelled rows) and `sample`.

    Of what a sample has once, sample_id, target and layer become coordinates; `attrs` are by variable.
    """
    variables: dict[str, Any] = {
        name: (dim, np.concatenate([each.values[name] for each in found]), dict(attrs.get(name, {})))
        for name in found[0].values
    }
    coords: dict[str, Any] = {
        name: (dim, np.concatenate([each.labels[name] for each in found])) for name in found[0].labels
    }
    for name in found[0].of_sample:
        column = np.asarray([each.of_sample[name] for each in found])
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
