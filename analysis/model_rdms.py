"""Dissimilarities that a hypothesis predicts, from the labels of the conditions alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .representation_rows import BLOCK_ROWS
from .splits import row_labels


def model_dissimilarity(
    conditions: xr.Dataset,
    *,
    same: Sequence[str] = (),
    distance: Mapping[str, Sequence[str]] | None = None,
) -> xr.Dataset:
    """One matrix a model: 0 or 1 for the same or another label, or the distance between positions.

    Parameters
    ----------
    conditions
        What `representational_dissimilarity` returned: the labels of its conditions are used, not its values.
        Where each condition is one sample, `with_samples(rdm, run, ...)` attaches columns of samples/.
    same
        Labels such as ``"relation"``; each is a model: 0 where two conditions share its value, else 1.
    distance
        Name of a model and the numeric labels that are coordinates of a place: Euclidean distance, as in
        ``{"position": ["subject_x", "subject_y"]}``.

    Returns
    -------
    dissimilarity (model, condition, other), float32: 0 or 1 (no units), or in the units of the labels.
        Labels of the conditions stay coordinates. Lazy where `conditions` is.

    Raises
    ------
    DimensionError  there is no `condition` axis or no such label on it, or no model is asked for.
    DataError       a condition lacks the label, or a distance is asked of words.
    """
    if "condition" not in conditions.dims or "other" not in conditions.dims:
        raise DimensionError(
            f"models need the dimensions condition and other, not {', '.join(map(str, conditions.dims))}.",
            "Pass what representational_dissimilarity returns.",
        )
    models = {name: _different(_label(conditions, name)) for name in same}
    for name, columns in (distance or {}).items():
        models[name] = _distance([_number(conditions, column) for column in columns])
    if not models:
        raise DimensionError(
            "no model is asked for.",
            "Pass same=['relation'], or distance={'position': ['subject_x', 'subject_y']}.",
        )
    axes = {"condition", "other"}
    labels = {str(name): coord for name, coord in conditions.coords.items() if set(coord.dims) <= axes}
    result = xr.Dataset(
        {"dissimilarity": (("model", "condition", "other"), da.stack(list(models.values())))},
        {**labels, "model": list(models)},
    )
    result["dissimilarity"].attrs["long_name"] = "predicted dissimilarity"
    return result if conditions.chunks else result.compute()


def _label(conditions: xr.Dataset, name: str) -> NDArray[Any]:
    if name not in conditions.variables or conditions[name].dims != ("condition",):
        held = [str(key) for key, coord in conditions.coords.items() if coord.dims == ("condition",)]
        raise DimensionError(
            f"the conditions have no label '{name}'; they have {', '.join(held)}.",
            f"Attach a column of the samples first: with_samples(rdm, run, '{name}').",
        )
    values = row_labels(conditions[name])
    missing = values == "" if values.dtype.kind == "U" else np.zeros(len(values), bool)
    if values.dtype.kind == "f":
        missing = ~np.isfinite(values)
    if missing.any():
        raise DataError(
            f"{missing.sum()} conditions have no '{name}', the first is number {np.flatnonzero(missing)[0]}.",
            "Leave them out: rdm.isel(condition=keep, other=keep).",
        )
    return values


def _number(conditions: xr.Dataset, name: str) -> NDArray[np.float32]:
    values = _label(conditions, name)
    if values.dtype.kind not in "fiu":
        raise DataError(f"'{name}' holds words, which have no distance.", f"Use it as same=['{name}'].")
    return values.astype(np.float32)


def _blocks(values: NDArray[Any]) -> Any:
    return da.from_array(values, chunks=BLOCK_ROWS)


def _different(values: NDArray[Any]) -> Any:
    code = _blocks(np.unique(values, return_inverse=True)[1])
    return (code[:, None] != code[None, :]).astype(np.float32)


def _distance(columns: Sequence[NDArray[np.float32]]) -> Any:
    steps = [_blocks(values)[:, None] - _blocks(values)[None, :] for values in columns]
    return da.sqrt(sum(step**2 for step in steps))
