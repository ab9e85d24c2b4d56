"""Does a direction found in one run read another? Trained probes applied to other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .finite import require_finite
from .linear_probe import MAX_BYTES, named_units, with_owners
from .probe_design import RowLabels, row_targets
from .probe_fit import best_scores, prediction_dtype
from .probe_graph import row_blocks
from .probe_labels import as_names
from .probe_rows import probe_features, probe_rows, with_units
from .probe_scores import chance, class_coordinates, first_classes, true_scores
from .token_selection import select_layers


def apply_probe(
    probe: xr.Dataset,
    data: xr.DataTree | xr.Dataset,
    *,
    target: str | Sequence[str] | None = None,
    site: str | None = None,
    tokens: str | None = None,
    level: float = 0.95,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Accuracy, or R^2, of an already trained probe on another run or on other rows, layer by layer; lazy.

    score = x . coefficient + intercept, with the directions that `linear_probe` trained on all of its rows.
    Rows that it was trained on are not held out here: what is reported is transfer only where the rows are
    others.

    Parameters
    ----------
    probe
        What `linear_probe` returned, or some of its layers.
    data
        A run; or a Dataset as `linear_probe` takes it.
    target, site, tokens
        As in `linear_probe`; where they are not given, those that the probe was trained with.

    Returns
    -------
    accuracy, accuracy_low, accuracy_high (layer[, head][, target]), float64, share of rows; or r2, ...
    chance ([target]), float64: share of the most frequent class among these rows; not for continuous targets.
    prediction (layer, row[, head][, target]): int16, index on `class`; or float32, units of the target.
    n_sample, n_row, n_set, n_excluded (), int64.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, token selection, or layer that the probe has.
    DimensionError  no such label; a width or heads that differ; a probe without directions.
    DataError       a class that the probe was not trained on; a target of another kind; when computed, a
                    value that is not finite, by sample and layer.
    """
    _require_directions(probe)
    names = as_names(target if target is not None else probe.attrs["target"])
    where = site or probe.attrs.get("site", "text/resid_post")
    which = tokens if tokens is not None else probe.attrs.get("tokens", "last")
    rows = probe_rows(data, names, where, which)
    numbers = [int(number) for number in np.atleast_1d(probe["layer"].values)]
    features = probe_features(select_layers(rows, numbers))
    labels = _labels_as_trained(row_targets(rows, names, least=1), probe)
    weights, intercept = _directions(probe, features)
    predicted = _predict(features, weights, intercept, labels, max_bytes)
    result = true_scores(predicted, labels, level)
    result["prediction"] = predicted.rename(row=str(features.dims[1]))
    if not labels.continuous:
        result["prediction"] = result["prediction"] + xr.DataArray(first_classes(labels), dims="target")
        result["chance"] = chance(labels)
    result = named_units(result, features)
    single = isinstance(probe.attrs["target"], str)
    result = (result.squeeze("target") if single else result).assign_coords(class_coordinates(labels))
    result = with_owners(result, features, labels)
    result.attrs = {"target": names[0] if single else list(names), "trained_on": probe.attrs["target"]}
    if isinstance(data, xr.DataTree):
        result.attrs |= {"site": where, "tokens": which or "all"}
    return result if features.chunks is not None else result.compute()


def _require_directions(probe: xr.Dataset) -> None:
    missing = [name for name in ("coefficient", "intercept") if name not in probe]
    if missing or "target" not in probe.attrs:
        raise DimensionError(
            f"this probe has no {' and no '.join(missing or ['attribute target'])}.",
            "Pass what linear_probe returns without an estimator; its attributes must be kept.",
        )


def _labels_as_trained(labels: RowLabels, probe: xr.Dataset) -> RowLabels:
    """Number the classes as the probe does."""
    trained = as_names(probe.attrs["target"])
    continuous = "class" not in probe.dims
    if len(labels.targets) != len(trained) or labels.continuous != continuous:
        kind = "continuous" if continuous else "of classes"
        raise DataError(
            f"the probe's targets ({', '.join(trained)}) are {len(trained)} and {kind}; "
            f"{', '.join(labels.targets)} is not like that.",
            "Name as many targets of that kind, in the order of the probe's.",
        )
    if continuous:
        return labels
    owner = np.asarray(probe["class_target"].values) if "class_target" in probe.coords else None
    held = np.asarray(probe["class"].values)
    classes, columns = [], []
    for place, (name, own) in enumerate(zip(trained, labels.classes, strict=True)):
        known = (held if owner is None else held[owner == name]).tolist()
        # Classes of several targets are named in one array, as text where their types differ.
        text = isinstance(known[0], str)
        places = {value: number for number, value in enumerate(known)}
        unknown = [value for value in own if (str(value) if text else value) not in places]
        if unknown:
            raise DataError(
                f"the probe was not trained on {', '.join(map(repr, unknown[:5]))}; it knows "
                f"{', '.join(map(repr, known[:5]))}.",
                "Leave these rows out, or train the probe on data that have the class.",
            )
        number = np.array([places[str(value) if text else value] for value in own])
        classes.append(known)
        columns.append(number[labels.truth[:, place]])
    return replace(labels, classes=tuple(classes), truth=np.column_stack(columns))


def _directions(probe: xr.Dataset, features: xr.DataArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights (layer, unit, column, feature) and intercepts (layer, unit, column)."""
    if "layer" not in probe.dims:
        probe = probe.expand_dims("layer")
    given = probe["coefficient"]
    unit = list(map(str, features.dims[2:-1]))
    column = [dim for dim in ("class", "target") if dim in given.dims]
    width = str(features.dims[-1])
    expected = ["layer", *unit, *column, width]
    if set(given.dims) != set(expected) or any(given.sizes[d] != features.sizes[d] for d in [*unit, width]):
        raise DimensionError(
            f"the probe's directions are {dict(given.sizes)}, these features {dict(features.sizes)}.",
            "Apply a probe to the same site of a model of the same shape: the widths and heads must agree.",
        )
    for name in unit:
        if name in probe.coords and name in features.coords and (probe[name] != features[name]).any():
            raise DimensionError(
                f"the probe's {name} {probe[name].values.tolist()} are not those of these features.",
                f"Select the same ones: rows.sel({name}=probe['{name}']).",
            )
    units, columns = (features.shape[2] if unit else 1), (given.sizes[column[0]] if column else 1)
    weights = given.transpose(*expected).values.reshape(given.sizes["layer"], units, columns, -1)
    intercept = probe["intercept"].transpose(*expected[:-1]).values.reshape(weights.shape[:3])
    return weights, intercept


def _predict(
    features: xr.DataArray, weights: Any, intercept: Any, labels: RowLabels, max_bytes: int
) -> xr.DataArray:
    """Predictions (layer, row, unit, target), lazily from blocks of bounded bytes."""
    values = with_units(features, labels.rows)
    blocked, starts = row_blocks(values, max_bytes)
    shared = delayed(labels, traverse=False)
    predicted = []
    for place, number in enumerate(np.asarray(features["layer"].values).tolist()):
        score = delayed(partial(_predict_block, weights[place], intercept[place], number))
        parts = [
            da.from_delayed(
                score(block, shared, int(start)),
                (int(stop - start), values.shape[2], len(labels.targets)),
                prediction_dtype(labels),
            )
            for block, start, stop in zip(
                blocked.to_delayed()[place, :, 0, 0], starts[:-1], starts[1:], strict=True
            )
        ]
        predicted.append(da.concatenate(parts))
    return xr.DataArray(da.stack(predicted).rechunk({1: -1}), dims=("layer", "row", "unit", "target"))


def _predict_block(
    weights: NDArray[Any],
    intercept: NDArray[Any],
    layer: int,
    block: NDArray[Any],
    labels: RowLabels,
    start: int,
) -> NDArray[Any]:
    features = block[0]
    require_finite(features, labels.samples[start : start + len(features)], layer)
    scores = np.einsum("nud,ucd->unc", features.astype(np.float32), weights, optimize=True)
    best = [best_scores(own + shift, labels)[:, 0] for own, shift in zip(scores, intercept, strict=True)]
    return np.stack(best, axis=1).astype(prediction_dtype(labels))
