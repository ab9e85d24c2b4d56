"""At which layer can a label be read off linearly? Every layer and head in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from dask.base import compute

from mechanistic.store.errors import SpecificationError

from .probe_design import ProbeDesign, probe_design
from .probe_graph import Training, train_layers
from .probe_labels import as_names
from .probe_rows import probe_features, probe_rows
from .probe_scores import (
    chance,
    class_coordinates,
    control_scores,
    first_classes,
    score_name,
    true_scores,
)
from .token_selection import select_layers

PENALTIES = tuple(float(10.0**power) for power in range(-2, 3))
LOGISTIC_PENALTIES = tuple(float(10.0**power) for power in range(-3, 1))
MAX_BYTES = 256 << 20


def linear_probe(
    data: xr.DataTree | xr.Dataset,
    *,
    target: str | Sequence[str],
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    method: Literal["ridge", "logistic"] = "ridge",
    control: str | None = None,
    folds: int = 5,
    repetitions: int = 20,
    penalties: Sequence[float] | None = None,
    estimator: Any = None,
    level: float = 0.95,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Held-out accuracy, or R^2, of linear probes of `target` at each layer (and head), with controls; lazy.

    Ridge regression, W = (X'X/n + a I)^-1 X'Y/n on standardised features; of class indicators (+1, -1), of
    which the largest score wins, or of continuous values. Every row is predicted by the probe of a fold that
    it was not in; samples with one `group` label share a fold; the penalty a is chosen inside the training
    folds alone. Rows are read once; twice where those of one layer exceed `max_bytes`, and for each step of
    ``"logistic"`` then.

    Parameters
    ----------
    data
        A run; or a Dataset with one array (layer, token or sample, feature) or (layer, token or sample, head,
        feature) and, as coordinates, the target and, where samples belong together, `group`.
    target
        A column of samples/ (relation, correct, subject_x, ...) or a label of the tokens (kind, patch_row,
        ...); floats are continuous. Several, all of one kind, are probed in the same pass, on rows that have
        them all.
    site, tokens, layer
        Which rows of a run, see `select_tokens`: ``"last"``, ``"'?'"``, ``"@-2"``, ``"image"``, ...
    method
        ``"logistic"``: mean cross-entropy + a/2 |w|^2 by L-BFGS (scikit-learn's C is 1 / (a n)); its controls
        get the penalty chosen for the true labels.
    control
        A label, such as token_text or subject, each value of which is given labels at random: Hewitt and
        Liang's control task. Its values must recur in several sets.
    repetitions
        Copies of the labels shuffled within what they are alike in: within minimal-pair sets for a relation;
        and of the control task.
    estimator
        A scikit-learn estimator to use instead, cloned for each fit; a layer must fit `max_bytes`.

    Returns
    -------
    accuracy, accuracy_low, accuracy_high (layer[, head][, target]), float64, share of rows; the interval
        minds the sets. For continuous targets instead r2, r2_low, r2_high: 1 - sum (y - prediction)^2 / sum
        (y - mean)^2.
    chance ([target]), float64, share of the most frequent class; not for continuous targets.
    shuffled_accuracy, shuffled_accuracy_low, shuffled_accuracy_high (layer[, head][, target]), float64: mean
        over shuffled copies of the labels, and the range that holds `level` of them; or shuffled_r2, ...
    control_accuracy, control_accuracy_low, control_accuracy_high, and selectivity = accuracy -
        control_accuracy, likewise; with `control` only.
    prediction (layer, row[, head][, target]), by the probe that was not trained on the row: int16, index on
        `class`; or float32, units of the target.
    coefficient (layer[, head], class, feature), intercept (layer[, head], class), float: score = x .
        coefficient + intercept, trained on all rows; penalty (layer[, head][, target]), float64. Not with an
        `estimator`. For continuous targets `class` is `target`, or absent; `class_target` says whose the
        classes are.
    n_sample, n_row, n_set, n_excluded (), int64: excluded rows have no label or failed.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection; an unknown method; targets of two kinds.
    DimensionError  no such label, or the features are not one array (layer, row[, head], feature).
    DataError       one class only, a class in fewer sets than folds, a control whose values do not recur;
                    when computed, a value that is not finite, by sample and layer.

    References
    ----------
    Alain and Bengio (2016), arXiv:1610.01644. Hastie, Tibshirani and Friedman (2009), sections 3.4 and 7.10.
    Hewitt and Liang (2019), arXiv:1909.03368.
    """
    names = as_names(target)
    rows = probe_rows(data, [*names, *([control] if control else [])], site, tokens)
    features = probe_features(select_layers(rows, layer))
    design = probe_design(rows, names, folds=folds, repetitions=repetitions, seed=seed, control=control)
    training = _training(method, penalties, estimator, max_bytes, design)
    predicted, fits = train_layers(features, design, training)
    if features.chunks is None:
        # Before they are scored: a graph of the scores of numbers in memory would cost more than the scores.
        predicted, fits = compute(predicted, fits)
    result = _scores(predicted, design, str(features.dims[1]), level)
    result = result.merge(fits, combine_attrs="drop") if fits is not None else result
    result = named_units(result, features).squeeze([] if not isinstance(target, str) else ["target"])
    result = result.assign_coords(class_coordinates(design))
    result = with_owners(result, features, design)
    result.attrs = {"target": target if isinstance(target, str) else list(names), "method": method}
    result.attrs |= {"folds": folds, "shuffled": design.shuffled, "seed": seed}
    if control:
        result.attrs["control"] = control
    if isinstance(data, xr.DataTree):
        result.attrs |= {"site": site, "tokens": tokens or "all"}
    return result


def named_units(result: xr.Dataset, features: xr.DataArray) -> xr.Dataset:
    """Rename `unit` to the dimension of the heads, or drop it; with the coordinates of layers and heads."""
    result = result.assign_coords(layer=features["layer"])
    if features.ndim == 3:
        return result.squeeze("unit")
    name = str(features.dims[2])
    result = result.rename(unit=name)
    return result.assign_coords({name: features[name]}) if name in features.coords else result


def with_owners(result: xr.Dataset, features: xr.DataArray, labels: Any) -> xr.Dataset:
    """Say of which sample each row is, where that is known."""
    axis = str(features.dims[1])
    if "sample_index" in features.coords or axis == "sample":
        return result.assign_coords(sample_index=(axis, labels.samples.astype(np.int32)))
    return result


def _training(
    method: str, penalties: Sequence[float] | None, estimator: Any, max_bytes: int, design: ProbeDesign
) -> Training:
    if method not in ("ridge", "logistic"):
        raise SpecificationError(f"There is no method {method!r}.", "There are 'ridge' and 'logistic'.")
    if method == "logistic" and design.continuous:
        raise SpecificationError(
            f"'{design.targets[0]}' is continuous; logistic regression needs classes.",
            "Use method='ridge' (the default), or cut the values into classes.",
        )
    default = PENALTIES if method == "ridge" else LOGISTIC_PENALTIES
    chosen = tuple(float(penalty) for penalty in (default if penalties is None else penalties))
    if not chosen or min(chosen) <= 0:
        raise SpecificationError(
            f"penalties is {chosen}.", "Give one or more numbers above 0, such as penalties=(0.1, 1.0, 10.0)."
        )
    return Training(method, chosen, estimator, max_bytes)


def _scores(predicted: xr.DataArray, design: ProbeDesign, axis: str, level: float) -> xr.Dataset:
    true = predicted.isel(labelling=0)
    result = true_scores(true, design, level).merge(control_scores(predicted, design, level))
    name = score_name(design)
    if f"control_{name}" in result:
        result["selectivity"] = (result[name] - result[f"control_{name}"]).assign_attrs(
            units="1", long_name=f"{name} - control {name}"
        )
    if design.continuous:
        return result.assign(prediction=true.rename(row=axis).assign_attrs(long_name="held-out prediction"))
    number = true + xr.DataArray(first_classes(design), dims="target")
    number = number.rename(row=axis).assign_attrs(long_name="predicted class, held out")
    return result.assign(chance=chance(design), prediction=number)
