"""At which layer can a label be read off linearly? Probes of every layer in one pass over the store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import optimize
from dask.delayed import delayed

from mechanistic.store import group, sites
from mechanistic.store import site as site_of
from mechanistic.store.errors import DataError, DimensionError

from .intervals import clustered_share_interval
from .probe_design import ProbeDesign, probe_design
from .probe_fit import fit_block, fit_estimator, fit_moments, moments_of_block, predict_again, predict_block
from .splits import with_samples
from .token_selection import select_layers, select_tokens

PENALTIES = tuple(float(10.0**power) for power in range(-3, 4))
MAX_BYTES = 256 << 20


def linear_probe(
    data: xr.DataTree | xr.Dataset,
    *,
    target: str,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    folds: int = 5,
    repetitions: int = 20,
    penalties: Sequence[float] = PENALTIES,
    estimator: Any = None,
    level: float = 0.95,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Cross-validated accuracy of a linear classifier of `target` at each layer, and its controls; lazy.

    Ridge regression on the class indicators (+1, -1), W = (X'X/n + a I)^-1 X'Y/n on standardised features,
    the largest score wins. Every row is predicted by the probe of a fold that it was not in; samples with one
    `group` label share a fold; the penalty a is chosen inside the training folds alone. Rows are read once;
    twice where those of one layer exceed `max_bytes`.

    Parameters
    ----------
    data
        A run; or a Dataset with one array (layer, token or sample, feature) and, as coordinates, the target
        and, where samples belong together, `group`.
    target
        A column of samples/ (relation, correct, ...) or a label of the tokens (kind, patch_row, ...).
    site, tokens, layer
        Which rows of a run, see `select_tokens`: ``"last"``, ``"'?'"``, ``"@-2"``, ``"image"``, ...
    repetitions
        Copies of the labels shuffled within what they are alike in: within minimal-pair sets for a relation.
    estimator
        A scikit-learn classifier to use instead, cloned for each fit; a layer must fit `max_bytes`.

    Returns
    -------
    accuracy, accuracy_low, accuracy_high (layer), float64, share of rows; the interval minds the sets.
    chance (), float64, share of the most frequent class.
    shuffled_accuracy, shuffled_accuracy_low, shuffled_accuracy_high (layer), float64: mean over shuffled
        copies of the labels, and the range that holds `level` of them.
    prediction (layer, row), int16: index on `class`, by the probe that was not trained on the row.
    coefficient (layer, class, feature), intercept (layer, class), float: score = x . coefficient + intercept,
        trained on all rows; penalty (layer), float64. Not with an `estimator`.
    n_sample, n_row, n_set, n_excluded (), int64: excluded rows have no label or failed.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  no such label, or the features are not one array (layer, row, feature).
    DataError       one class only, a class in fewer sets than folds; when computed, a value that is not
                    finite, by sample and layer.

    References
    ----------
    Alain and Bengio (2016), arXiv:1610.01644. Hastie, Tibshirani and Friedman (2009), sections 3.4 and 7.10.
    """
    rows = _probe_rows(data, target, site, tokens)
    features = _features(select_layers(rows, layer))
    design = probe_design(rows, target, folds=folds, repetitions=repetitions, seed=seed)
    axis = str(features.dims[1])
    lazy = features.chunks is not None
    values = da.asarray(features.isel({axis: design.rows}).data)
    predicted, fits = _graph(values, features, design, tuple(penalties), estimator, max_bytes)
    result = _accuracies(predicted, design, axis, level)
    if fits is not None:
        result = result.merge(_directions(fits, design, features))
    result = result.assign_coords({"layer": features["layer"], "class": design.classes})
    if "sample_index" in features.coords or axis == "sample":
        result = result.assign_coords(sample_index=(axis, design.samples.astype(np.int32)))
    result.attrs = {"target": target, "folds": folds, "shuffled": design.shuffled, "seed": seed}
    if isinstance(data, xr.DataTree):
        result.attrs |= {"site": site, "tokens": tokens or "all"}
    return result if lazy else result.compute()


def _probe_rows(data: xr.DataTree | xr.Dataset, target: str, site: str, tokens: str | None) -> xr.Dataset:
    if isinstance(data, xr.Dataset):
        return data
    # The last prompt token, the commonest read, has a small group of its own where it was captured.
    name = f"{site}_last" if tokens == "last" and f"{site}_last" in sites(data) else site
    rows = site_of(data, name)
    if name == site:
        rows = select_tokens(rows, tokens)
    columns = group(data, "samples").variables
    wanted = [target, *(name for name in ("group", "status") if name in columns and name != target)]
    return with_samples(rows, data, [name for name in wanted if name not in rows.variables])


def _features(rows: xr.Dataset) -> xr.DataArray:
    arrays = [array for array in rows.data_vars.values() if array.dtype.kind == "f" and "layer" in array.dims]
    if len(arrays) != 1 or arrays[0].ndim != 3 or arrays[0].dims[0] != "layer":
        shapes = ", ".join(f"{array.name} {tuple(array.dims)}" for array in arrays) or "none"
        raise DimensionError(
            f"a probe reads one array (layer, row, feature); these data have {shapes}.",
            "Choose a residual site, or stack the others: dataset.stack(feature=['head', 'd_head']).",
        )
    return arrays[0]


def _graph(
    values: Any,
    features: xr.DataArray,
    design: ProbeDesign,
    penalties: tuple[float, ...],
    estimator: Any,
    max_bytes: int,
) -> tuple[Any, list[Any] | None]:
    """Predictions (layer, row, labelling) and a delayed fit a layer, from blocks within `max_bytes`."""
    _, count, width = values.shape
    size = max(1, max_bytes // (4 * width))
    blocked = values.rechunk({0: 1, 1: min(size, max(1, count)), 2: -1})
    starts = np.concatenate([[0], np.cumsum(blocked.chunks[1])])
    if estimator is not None and len(starts) > 2:
        raise DataError(
            f"an estimator needs all {count} rows of a layer at once, {4 * count * width >> 20} MiB.",
            f"Pass max_bytes={4 * count * width}, fewer tokens, or no estimator: the built-in one streams.",
        )
    numbers = np.asarray(features["layer"].values).tolist()
    shared = delayed(design, traverse=False)
    blocks = blocked.to_delayed()
    predicted, fits = [], []
    for place, number in enumerate(numbers):
        own = blocks[place, :, 0]
        if estimator is not None:
            parts = [delayed(fit_estimator)(own[0], shared, estimator, number)]
        elif len(own) == 1:
            fits.append(delayed(fit_block)(own[0], shared, penalties, number))
            parts = [delayed(predict_block)(own[0], fits[-1], shared, 0)]
        else:
            total = None
            for block, start in zip(own, starts[:-1], strict=True):
                total = delayed(moments_of_block)(block, shared, int(start), number, total)
            fits.append(delayed(fit_moments)(total, shared, penalties))
            # Read again, not kept until the fit is done: a layer of several blocks may exceed memory.
            (layer,) = optimize(blocked[place : place + 1])
            parts = [
                delayed(partial(predict_again, layer.blocks[0, block, 0]))(fits[-1], shared, int(start))
                for block, start in enumerate(starts[:-1])
            ]
        rows = [
            da.from_delayed(part, (int(stop - start), design.codes.shape[1]), np.int16)
            for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True)
        ]
        predicted.append(da.concatenate(rows))
    return da.stack(predicted), None if estimator is not None else fits


def _accuracies(predicted: Any, design: ProbeDesign, axis: str, level: float) -> xr.Dataset:
    hits = predicted.rechunk({1: -1}) == design.codes[None]
    true = xr.DataArray(hits[..., 0], dims=("layer", "row"))
    bounds = xr.apply_ufunc(
        partial(_interval, clusters=design.sets, level=level),
        true,
        input_core_dims=[["row"]],
        output_core_dims=[["bound"]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"bound": 2}},
    )
    shuffled = xr.DataArray(hits[..., 1:], dims=("layer", "row", "repetition")).mean("row")
    spread = shuffled.quantile([0.5 - level / 2, 0.5 + level / 2], "repetition").drop_vars("quantile")
    share = {"units": "1"}
    counts = np.bincount(design.codes[:, 0], minlength=len(design.classes))
    numbers = {
        "n_sample": len(np.unique(design.samples)),
        "n_row": len(design.rows),
        "n_set": len(np.unique(design.sets)),
        "n_excluded": design.excluded,
    }
    return xr.Dataset(
        {
            "accuracy": true.mean("row").assign_attrs(share, long_name="cross-validated accuracy"),
            "accuracy_low": bounds.isel(bound=0).assign_attrs(share),
            "accuracy_high": bounds.isel(bound=1).assign_attrs(share),
            "chance": ((), counts.max() / counts.sum(), {**share, "long_name": "most frequent class"}),
            "shuffled_accuracy": shuffled.mean("repetition").assign_attrs(share, long_name="shuffled labels"),
            "shuffled_accuracy_low": spread.isel(quantile=0).assign_attrs(share),
            "shuffled_accuracy_high": spread.isel(quantile=1).assign_attrs(share),
            "prediction": (("layer", axis), predicted[..., 0], {"long_name": "predicted class, held out"}),
            **{name: ((), np.int64(number)) for name, number in numbers.items()},
        }
    )


def _interval(hits: Any, clusters: Any, level: float) -> Any:
    return np.stack(clustered_share_interval(hits, clusters, level=level), axis=-1)


def _directions(fits: list[Any], design: ProbeDesign, features: xr.DataArray) -> xr.Dataset:
    """The probe trained on all rows, in the units of the features: a direction for each class."""
    classes, width = len(design.classes), features.shape[2]

    def stacked(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return da.stack([da.from_delayed(getattr(fit, name), shape, dtype) for fit in fits])

    return xr.Dataset(
        {
            "coefficient": (
                ("layer", "class", str(features.dims[2])),
                stacked("direction", (classes, width), np.float32),
                {"long_name": "score of the class for each unit of the feature"},
            ),
            "intercept": (("layer", "class"), stacked("offset", (classes,), np.float64)),
            "penalty": (("layer",), stacked("strength", (), np.float64)),
        }
    )
