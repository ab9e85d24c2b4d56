"""Directions in the residual stream: class means, their differences, the angles between them, projections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .conditions import Conditions, conditions_of
from .finite import require_finite
from .group_means import group_sums
from .map_rows import map_rows
from .representation_rows import Representations, layer_numbers, representation_rows, sample_numbers
from .single_precision import to_single


def class_directions(
    data: Representations,
    *,
    target: str,
    axes: Mapping[str, tuple[str, str]] | None = None,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
) -> xr.Dataset:
    """Mean of each class, and the differences between means that span the axes of a concept; lazy, one pass.

    Parameters
    ----------
    target
        A column of samples/ or a label of the rows whose values are the classes.
    axes
        Name of an axis and the classes it runs from and to, as in ``{"horizontal": ("left", "right")}``. None
        takes every pair of classes.

    Returns
    -------
    class_mean (layer, class, feature), float32, units of the site.
    direction (layer, axis, feature), float32: mean of the class it runs to less that of the one it runs from.
    separation (layer, axis), float32: length of the direction, units of the site.
    cosine (layer, axis, other_axis), float32: between directions, -1 to 1; NaN for one of length 0.
    n_row (class), int64; n_excluded (), int64: rows without a label.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  no such label, not (layer, row, feature), or an axis names a class that does not occur.
    DataError       one class only; when computed, a value that is not finite (by sample and layer).

    References
    ----------
    Marks and Tegmark (2023), arXiv:2310.06824.
    """
    rows = representation_rows(data, site=site, tokens=tokens, layer=layer, labels=[target])
    classes = conditions_of(rows, target)
    ends = _ends(classes, target, axes)
    feature = str(rows.dims[2])
    names = np.asarray(classes.labels["condition"])
    units = {"units": rows.attrs.get("units", "1")}
    means = xr.DataArray(
        _means(rows, classes),
        {"layer": layer_numbers(rows), "class": names},
        ("layer", "class", feature),
        attrs={**units, "long_name": "mean of the class"},
    )
    starts, stops = ([end[side] for end in ends.values()] for side in (0, 1))
    direction, separation, cosine = xr.apply_ufunc(
        _geometry,
        means,
        kwargs={"starts": starts, "stops": stops},
        input_core_dims=[["class", feature]],
        output_core_dims=[["axis", feature], ["axis"], ["axis", "other_axis"]],
        dask="parallelized",
        output_dtypes=[means.dtype, means.dtype, np.float32],
        dask_gufunc_kwargs={"output_sizes": {"axis": len(ends), "other_axis": len(ends)}},
    )
    result = xr.Dataset({"class_mean": means, "direction": direction.assign_attrs(units)})
    result["separation"] = separation.assign_attrs(units, long_name="length")
    result["cosine"] = cosine.assign_attrs(units="1", long_name="cosine")
    result = result.assign_coords(axis=list(ends), other_axis=list(ends))
    result["n_row"] = ("class", classes.sizes, {"units": "row"})
    result["n_excluded"] = ((), np.int64(classes.excluded), {"units": "row"})
    result.attrs = {"target": target}
    if isinstance(data, xr.DataTree):
        result.attrs |= {"site": site, "tokens": tokens or "all"}
    return result if rows.chunks is not None else result.compute()


def direction_cosines(first: xr.DataArray, second: xr.DataArray | None = None) -> xr.Dataset:
    """Cosine of each direction with each other one, layer by layer; lazy.

    Parameters
    ----------
    first, second
        Directions (layer, name, feature), such as `direction` of `class_directions` or `coefficient` of a
        probe; without `second`, the first with itself. Layers are matched by number.

    Returns
    -------
    cosine (layer, name, other_name), float32, -1 to 1; NaN for a direction of length 0.

    Raises
    ------
    DimensionError  not (layer, name, feature), features of different number, or no layer in common.
    """
    second = first if second is None else second
    for directions in (first, second):
        if directions.ndim != 3 or directions.dims[0] != "layer":
            raise DimensionError(
                f"directions are (layer, name, feature); these are ({', '.join(map(str, directions.dims))}).",
                "Pass the variable itself: result['direction'], or probe['coefficient'].",
            )
    if first.shape[2] != second.shape[2]:
        raise DimensionError(
            f"the directions have {first.shape[2]} and {second.shape[2]} features.",
            "They must be of one model.",
        )
    name, feature = (str(dim) for dim in first.dims[1:])
    other = second.rename({second.dims[1]: f"other_{name}", second.dims[2]: feature})
    left, right = xr.align(first, other, join="inner", exclude=[name, f"other_{name}", feature])
    if not left.sizes["layer"]:
        raise DimensionError("the directions have no layer in common.", "Their layers are named by number.")
    cosine = xr.apply_ufunc(
        _cosines,
        left,
        right,
        input_core_dims=[[name, feature], [f"other_{name}", feature]],
        output_core_dims=[[name, f"other_{name}"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"allow_rechunk": True},
    )
    return xr.Dataset({"cosine": cosine.assign_attrs(units="1", long_name="cosine")})


def project_rows(
    data: Representations,
    directions: xr.DataArray,
    *,
    origin: xr.DataArray | None = None,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    labels: Sequence[str] = (),
) -> xr.Dataset:
    """Where each row lies along stored directions, (x - origin) . d / |d|; lazy.

    Parameters
    ----------
    directions
        (layer, name, feature) or (name, feature): of this run, or of another one of the same model.
    origin
        (layer, feature), such as the mean of all rows; None leaves rows as they are.
    labels
        Columns of samples/ to attach to the rows.

    Returns
    -------
    projection (layer, row, name), float32, units of the site; NaN along a direction of length 0. Rows keep
        their labels.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  features of different number, or a layer that the directions lack.
    DataError       when computed, a value that is not finite (by sample and layer).
    """
    rows = representation_rows(data, site=site, tokens=tokens, layer=layer, labels=labels)
    feature = str(rows.dims[2])
    own = str(directions.dims[-1])
    if rows.shape[2] != directions.shape[-1]:
        raise DimensionError(
            f"the rows have {rows.shape[2]} features, the directions {directions.shape[-1]}.",
            "Directions transfer between runs of one model and one site.",
        )
    names = [str(dim) for dim in directions.dims if dim not in ("layer", own)]
    given = [_layers_of(directions.rename({own: feature}), rows).transpose("layer", *names, feature)]
    if origin is not None:
        given.append(_layers_of(origin.rename({origin.dims[-1]: feature}), rows).transpose("layer", feature))
    sizes = [directions.sizes[name] for name in names]
    flat = map_rows(_projection_kernel, rows, *given, into="direction", size=math.prod(sizes))
    values = flat.data if len(sizes) == 1 else flat.data.reshape(*rows.shape[:2], *sizes)
    named = {name: directions[name] for name in names if name in directions.coords}
    projected = xr.DataArray(values, {**flat.coords, **named}, (*rows.dims[:2], *names))
    attrs = {"units": rows.attrs.get("units", "1"), "long_name": "projection on the direction"}
    return xr.Dataset({"projection": projected.assign_attrs(attrs)})


def _ends(
    classes: Conditions, target: str, axes: Mapping[str, tuple[str, str]] | None
) -> dict[str, tuple[int, int]]:
    names = [str(name) for name in classes.labels["condition"]]
    if len(names) < 2:
        raise DataError(
            f"'{target}' has one class only, {names[0]!r}, in {len(classes.rows)} rows.",
            "A direction needs two: choose another target, or capture more samples.",
        )
    if axes is None:
        return {f"{names[b]} - {names[a]}": (a, b) for a, b in combinations(range(len(names)), 2)}
    missing = [name for ends in axes.values() for name in ends if str(name) not in names]
    if missing:
        raise DimensionError(
            f"'{target}' has no class {', '.join(map(repr, missing))}; it has {', '.join(names)}.",
            "Name an axis and the classes it runs from and to: axes={'horizontal': ('left', 'right')}.",
        )
    return {axis: (names.index(str(start)), names.index(str(stop))) for axis, (start, stop) in axes.items()}


def _means(rows: xr.DataArray, classes: Conditions) -> Any:
    """Means (layer, class, feature), lazy."""
    values = rows.data if isinstance(rows.data, da.Array) else da.from_array(rows.values, name=False)
    code = np.full(rows.shape[1], -1)
    code[classes.rows] = classes.code
    sums = group_sums(values, layer_numbers(rows), sample_numbers(rows), code, classes.count)
    means = sums / classes.sizes[:, None]
    # Of all layers in one task, where they are small: there is less to compute than to administer.
    return means.astype(np.result_type(rows.dtype, np.float32)).rechunk({0: "auto", 1: -1, 2: -1})


def _geometry(
    means: NDArray[Any], starts: Sequence[int], stops: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    direction = means[:, stops] - means[:, starts]
    return direction, np.linalg.norm(direction, axis=-1), _cosines(direction, direction)


def _cosines(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
    cosines = _unit(first) @ np.swapaxes(_unit(second), -1, -2)
    return np.clip(cosines, -1, 1).astype(np.float32)


def _projection_kernel(
    values: NDArray[Any],
    layer: NDArray[np.int64],
    sample: NDArray[np.int64],
    directions: NDArray[Any],
    origin: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """(layer, row, direction)."""
    values = values if values.dtype == np.float64 else to_single(values)
    units = _unit(directions.reshape(len(values), -1, values.shape[-1]))
    # Along (1, 1, ...) a row is finite only if all of its values are.
    weights = np.concatenate([units, np.ones_like(units[:, :1])], axis=1).astype(values.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        products = values @ weights.swapaxes(1, 2)
    require_finite(values, sample, layer[:, None], sums=products[..., -1])
    projected = products[..., :-1]
    if origin is not None:
        projected = projected - np.vecdot(units, origin[:, None].astype(np.float64))[:, None]
    return np.asarray(projected, np.float32)


def _unit(directions: NDArray[Any]) -> NDArray[np.float64]:
    """Of length 1, in double precision; NaN for one of length 0."""
    length = np.linalg.norm(directions.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(directions / np.where(length > 0, length, np.nan), np.float64)


def _layers_of(directions: xr.DataArray, rows: xr.DataArray) -> xr.DataArray:
    """The directions of the layers of the rows; one without layers is that of each."""
    wanted = layer_numbers(rows)
    if "layer" not in directions.dims:
        return directions.expand_dims(layer=wanted)
    missing = [number for number in wanted if number not in directions["layer"].values]
    if missing:
        raise DimensionError(
            f"there are no directions for layer {', '.join(map(str, missing))}.",
            "Project the layers that they have: layer=..., or one direction: directions.sel(layer=...).",
        )
    return directions.sel(layer=wanted)
