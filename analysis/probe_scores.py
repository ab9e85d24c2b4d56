"""How good predictions of a probe are: accuracy or held-out R^2, with intervals, beside its controls."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .intervals import clustered_ratio_interval, clustered_share_interval
from .probe_design import ProbeDesign, RowLabels

_NAMES = {"accuracy": "held-out accuracy", "r2": "held-out R^2"}


def score_name(labels: RowLabels) -> str:
    return "r2" if labels.continuous else "accuracy"


def true_scores(predicted: xr.DataArray, labels: RowLabels, level: float) -> xr.Dataset:
    """Score and interval of predictions (layer, row, unit, target), and how many rows there were."""
    name = score_name(labels)
    gains, totals = _gains(predicted, labels.truth)
    interval = clustered_ratio_interval if labels.continuous else clustered_share_interval
    inputs = [gains, totals] if labels.continuous else [gains]
    bounds = xr.apply_ufunc(
        partial(_bounds, interval=interval, clusters=labels.sets, level=level),
        *inputs,
        input_core_dims=[["row"]] * len(inputs),
        output_core_dims=[["bound"]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"bound": 2}},
    )
    share = {"units": "1"}
    scored = {
        name: (gains.sum("row") / totals.sum("row")).assign_attrs(share, long_name=_NAMES[name]),
        f"{name}_low": bounds.isel(bound=0).assign_attrs(share),
        f"{name}_high": bounds.isel(bound=1).assign_attrs(share),
    }
    return xr.Dataset(scored | _counts(labels))


def control_scores(predicted: xr.DataArray, design: ProbeDesign, level: float) -> xr.Dataset:
    """Means and ranges of the score on shuffled labels, and on control tasks where there are any."""
    gains, totals = _gains(predicted, design.codes)
    scores = gains.sum("row") / totals.sum("row")
    first = design.repetitions + 1
    kinds = {"shuffled": slice(1, first)}
    if design.codes.shape[1] > first:
        kinds["control"] = slice(first, None)
    variables = {}
    for kind, place in kinds.items():
        own = scores.isel(labelling=place)
        name = f"{kind}_{score_name(design)}"
        spread = own.quantile([0.5 - level / 2, 0.5 + level / 2], "labelling").drop_vars("quantile")
        variables[name] = own.mean("labelling").assign_attrs(units="1", long_name=f"{kind} labels")
        variables[f"{name}_low"] = spread.isel(quantile=0).assign_attrs(units="1")
        variables[f"{name}_high"] = spread.isel(quantile=1).assign_attrs(units="1")
    return xr.Dataset(variables)


def chance(labels: RowLabels) -> xr.DataArray:
    """The share of the most frequent class (target)."""
    shares = [np.bincount(column).max() / len(column) for column in labels.truth.T]
    return xr.DataArray(shares, dims="target", attrs={"units": "1", "long_name": "most frequent class"})


def class_coordinates(labels: RowLabels) -> dict[str, Any]:
    """What the scores of a probe are of: `class`, and `class_target` where there are several targets."""
    if labels.continuous:
        return {"target": list(labels.targets)} if len(labels.targets) > 1 else {}
    names = [name for classes in labels.classes for name in classes]
    if len({type(name) for name in names}) > 1:
        names = [str(name) for name in names]
    owners = np.repeat(labels.targets, labels.sizes)
    several = {"class_target": ("class", owners), "target": list(labels.targets)}
    return {"class": names} | (several if len(labels.targets) > 1 else {})


def first_classes(labels: RowLabels) -> NDArray[np.int16]:
    """Where each target's classes begin on the dimension `class`."""
    return np.cumsum([0, *labels.sizes[:-1]]).astype(np.int16)


def _gains(predicted: xr.DataArray, codes: NDArray[Any]) -> tuple[xr.DataArray, xr.DataArray]:
    """What each row adds to the score, and to what it is a share of; codes (row, labelling?, target)."""
    dims = ("row", "target") if codes.ndim == 2 else ("row", "labelling", "target")
    truth = xr.DataArray(codes, dims=dims)
    if codes.dtype.kind != "f":
        hits = predicted == truth
        return hits, xr.ones_like(hits, np.int64)
    total = xr.zeros_like(predicted, np.float64) + (truth - truth.mean("row")) ** 2
    return total - (predicted.astype(np.float64) - truth) ** 2, total


def _bounds(*values: Any, interval: Any, clusters: Any, level: float) -> Any:
    return np.stack(interval(*values, clusters, level=level), axis=-1)


def _counts(labels: RowLabels) -> dict[str, Any]:
    numbers = {
        "n_sample": len(np.unique(labels.samples)),
        "n_row": len(labels.rows),
        "n_set": len(np.unique(labels.sets)),
        "n_excluded": labels.excluded,
    }
    return {name: ((), np.int64(number)) for name, number in numbers.items()}
