"""The graph of a probe: which blocks are read, fitted and predicted, within a bound of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import optimize
from dask.delayed import delayed
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .probe_design import ProbeDesign
from .probe_fit import (
    fit_block,
    fit_estimator,
    fit_logistic,
    fit_moments,
    moments_of_block,
    predict_block,
    prediction_dtype,
)
from .probe_rows import with_units


@dataclass(frozen=True)
class Training:
    """How a probe is fitted, and how many bytes of a layer may be held at once."""

    method: str
    penalties: tuple[float, ...]
    estimator: Any
    max_bytes: int


def train_layers(
    features: xr.DataArray, design: ProbeDesign, training: Training
) -> tuple[xr.DataArray, xr.Dataset | None]:
    """Predictions (layer, row, unit, labelling, target), held out, and the probes of all rows; lazy."""
    values = with_units(features, design.rows)
    blocked, starts = row_blocks(values, training.max_bytes)
    if training.estimator is not None and len(starts) > 2:
        needed = values.nbytes // values.shape[0]
        raise DataError(
            f"an estimator needs all {values.shape[1]} rows of a layer at once, {needed >> 20} MiB.",
            f"Pass max_bytes={needed}, fewer tokens, or no estimator: the built-in one streams.",
        )
    numbers = np.asarray(features["layer"].values).tolist()
    shared = delayed(design, traverse=False)
    pieces = blocked.to_delayed()[:, :, 0, 0]
    predicted, fits = [], []
    for place, number in enumerate(numbers):
        parts, fit = _layer(blocked[place : place + 1], pieces[place], starts, shared, training, number)
        fits.append(fit)
        rows = [
            da.from_delayed(
                part,
                (int(stop - start), values.shape[2], *design.codes.shape[1:]),
                prediction_dtype(design),
            )
            for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True)
        ]
        predicted.append(da.concatenate(rows))
    stacked = da.stack(predicted).rechunk({1: -1})
    result = xr.DataArray(stacked, dims=("layer", "row", "unit", "labelling", "target"))
    return result, None if training.estimator is not None else _directions(fits, design, features)


def row_blocks(values: Any, max_bytes: int) -> tuple[Any, NDArray[np.int64]]:
    """Values (layer, row, unit, feature) in blocks of whole rows within `max_bytes`, and their first rows."""
    _, count, units, width = values.shape
    size = max(1, max_bytes // (4 * units * width))
    blocked = values.rechunk({0: 1, 1: min(size, max(1, count)), 2: -1, 3: -1})
    return blocked, np.concatenate([[0], np.cumsum(blocked.chunks[1])])


def _layer(
    layer: Any, own: Any, starts: NDArray[np.int64], shared: Any, training: Training, number: int
) -> tuple[list[Any], Any]:
    """Delayed predictions, a block each, and the delayed fit of one layer."""
    penalties = training.penalties
    if training.estimator is not None:
        return [delayed(fit_estimator)(own[0], shared, training.estimator, number)], None
    if len(own) == 1:
        if training.method == "logistic":
            fit = delayed(_fit_logistic_block)(own[0], shared, penalties, number)
        else:
            fit = delayed(fit_block)(own[0], shared, penalties, number)
        return [delayed(predict_block)(own[0], fit, shared, 0)], fit
    # Read again, not kept until the fit is done: a layer of several blocks may exceed memory.
    (again,) = optimize(layer)
    blocks = [again.blocks[0, block, 0, 0] for block in range(len(own))]
    if training.method == "logistic":
        read = partial(_read, blocks, starts[:-1].tolist())
        fit = delayed(partial(fit_logistic, read, layer.shape[2]))(shared, penalties, number)
    else:
        total = None
        for block, start in zip(own, starts[:-1], strict=True):
            total = delayed(moments_of_block)(block, shared, int(start), number, total)
        fit = delayed(fit_moments)(total, shared, penalties)
    return [
        delayed(partial(_predict_again, block))(fit, shared, int(start))
        for block, start in zip(blocks, starts[:-1], strict=True)
    ], fit


def _fit_logistic_block(block: NDArray[Any], design: ProbeDesign, penalties: Any, layer: int) -> Any:
    return fit_logistic(lambda: iter([(0, block)]), block.shape[2], design, penalties, layer)


def _read(blocks: list[Any], starts: list[int]) -> Iterator[tuple[int, NDArray[Any]]]:
    for start, block in zip(starts, blocks, strict=True):
        yield start, block.compute(scheduler="synchronous")


def _predict_again(block: Any, probe: Any, design: ProbeDesign, start: int) -> NDArray[Any]:
    """`predict_block` of a dask block that is read here and now, and dropped afterwards."""
    return predict_block(block.compute(scheduler="synchronous"), probe, design, start)


def _directions(fits: list[Any], design: ProbeDesign, features: xr.DataArray) -> xr.Dataset:
    """The probe trained on all rows, in the units of the features: a direction for each class."""
    units, width = (1 if features.ndim == 3 else features.shape[2]), features.shape[-1]
    columns, kind = sum(design.sizes), "target" if design.continuous else "class"

    def stacked(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return da.stack([da.from_delayed(getattr(fit, name), shape, dtype) for fit in fits])

    meaning = {"long_name": "score for each unit of the feature"}
    return xr.Dataset(
        {
            "coefficient": (
                ("layer", "unit", kind, str(features.dims[-1])),
                stacked("direction", (units, columns, width), np.float32),
                meaning,
            ),
            "intercept": (("layer", "unit", kind), stacked("offset", (units, columns), np.float64)),
            "penalty": (
                ("layer", "unit", "target"),
                stacked("strength", (units, len(design.targets)), np.float64),
            ),
        }
    )
