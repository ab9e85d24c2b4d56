"""Split results by what is known of samples and tokens; summarise each split with its interval and size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DimensionError
from mechanistic.store.schema import STATUS

from .blocks import sample_spans
from .intervals import bootstrap_interval, t_interval
from .sample_means import Groups, mean_of_groups
from .token_selection import token_axis


def with_samples(dataset: xr.Dataset, run: xr.DataTree, columns: str | Sequence[str]) -> xr.Dataset:
    """Give each row the columns of its sample, such as correct or relation, as coordinates; lazy.

    Parameters
    ----------
    dataset
        Anything with token rows (`sample_index`), or with one row for each sample of the run (`sample`).

    Raises
    ------
    DimensionError  the samples table has no such column, the rows cannot be told, or the name is taken.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    samples = group(run, "samples")
    held = [str(name) for name, column in samples.variables.items() if column.dims == ("sample",)]
    axis, index = _sample_rows(dataset, samples.sizes["sample"])
    added = {}
    for name in names:
        if name not in held:
            raise DimensionError(
                f"the samples of this run have no column '{name}'; they have {', '.join(held)}.",
                "Name one of these, or a label that the tokens themselves have, such as 'kind'.",
            )
        if name in dataset.variables:
            raise DimensionError(
                f"these rows already have a '{name}'.",
                f"Rename or drop it first: dataset.drop_vars('{name}').",
            )
        column = samples[name]
        values = np.asarray(column.values)
        # To repeat a text is to copy it, to repeat an object is not.
        values = values.astype(object) if values.dtype.kind == "T" else values
        added[name] = (axis, _look_up(values, index), column.attrs)
    return dataset.assign_coords(added)


def captured_samples(run: xr.DataTree) -> NDArray[np.int64]:
    """The rows of samples/ that were captured: not those that failed, even if a later row made them good."""
    samples = group(run, "samples")
    if "status" not in samples.variables:
        return np.arange(samples.sizes["sample"])
    return np.flatnonzero(np.asarray(samples["status"].values) == STATUS["ok"])


def summarize(
    dataset: xr.Dataset,
    *,
    by: str | Sequence[str] = (),
    method: Literal["t", "bootstrap"] = "t",
    level: float = 0.95,
    clusters: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Mean over samples in each split, its confidence interval, and how many samples there are; lazy.

    The rows of one sample are averaged first, so that the sample is the unit, however many tokens it has.

    Parameters
    ----------
    by
        Coordinates of the rows: token labels, or columns added by `with_samples`. Several make a table.
    method
        ``"t"``: Student's interval over samples; ``"bootstrap"``: percentiles of resampled means.
    clusters
        For the bootstrap: a coordinate such as ``"group"`` whose samples are drawn together.

    Returns
    -------
    each variable (*by, ...): its mean; NAME_low, NAME_high (*by, ...): the interval, same units.
        Intervals are NaN in a split of one sample, everything is in an empty one.
    n_sample (*by), int64: samples in the split.

    Raises
    ------
    DimensionError      a label is missing, or there are no rows to summarise.
    SpecificationError  `level` is not between 0 and 1.
    """
    names = [by] if isinstance(by, str) else list(by)
    axis, _ = _sample_rows(dataset, None)
    splits, code = _splits_of_rows(dataset, names, axis)
    count = math.prod(map(len, splits))
    means, split, first = _means_in_splits(dataset, axis, code, count)
    grouping = None if clusters is None else row_labels(_label(dataset, clusters, axis)[first])
    interval = partial(
        _interval, method=method, level=level, clusters=grouping, resamples=resamples, seed=seed
    )
    members = [np.flatnonzero(split == number) for number in range(count)]
    variables: dict[str, Any] = {}
    for name, variable in means.data_vars.items():
        whole = variable.chunk(sample=-1) if variable.chunks is not None else variable
        computed = xr.apply_ufunc(
            partial(_means_and_intervals, members=members, interval=interval),
            whole,
            input_core_dims=[["sample"]],
            output_core_dims=[["split", "statistic"]],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"output_sizes": {"split": count, "statistic": 3}},
        ).transpose("split", ...)
        for place, suffix in enumerate(("", "_low", "_high")):
            variables[f"{name}{suffix}"] = computed.isel(statistic=place).assign_attrs(variable.attrs)
    sizes = np.array([len(rows) for rows in members], np.int64)
    variables["n_sample"] = xr.DataArray(sizes, dims="split", attrs={"units": "sample"})
    table = _unstack(xr.Dataset(variables), dict(zip(names, map(len, splits), strict=True)))
    return table.assign_coords(dict(zip(names, splits, strict=True))).assign_attrs(dataset.attrs)


def row_labels(column: xr.DataArray) -> NDArray[Any]:
    """What the values of a label column mean: the names of an enumeration, else the values themselves."""
    values = np.asarray(column.values)
    meanings = column.attrs.get("flag_meanings")
    if meanings is None:
        return values.astype(object).astype(str) if values.dtype.kind in "OTU" else values
    names = dict(zip(np.atleast_1d(column.attrs["flag_values"]).tolist(), str(meanings).split(), strict=True))
    return np.array([names[int(value)] for value in values], str)


def split_names(column: xr.DataArray, labels: NDArray[Any]) -> list[Any]:
    """The splits that occur, an enumeration's in its own order, others sorted."""
    present: list[Any] = np.unique(labels).tolist()
    if "flag_meanings" in column.attrs:
        return [name for name in str(column.attrs["flag_meanings"]).split() if name in present]
    return present


def _splits_of_rows(
    dataset: xr.Dataset, names: Sequence[str], axis: str
) -> tuple[list[list[Any]], NDArray[np.int64]]:
    """The splits of each label, and the place of each row in the table of them all."""
    splits, code = [], np.zeros(dataset.sizes[axis], np.int64)
    for name in names:
        column = _label(dataset, name, axis)
        values, place = _numbered(np.asarray(column.values))
        present = row_labels(xr.DataArray(values, attrs=column.attrs))
        splits.append(split_names(column, present))
        code *= len(present)
        code += np.array([splits[-1].index(value) for value in present.tolist()], np.int64)[place]
    return splits, code


def _numbered(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Each value once, and which of them each is; texts are not sorted for it, which takes twice as long."""
    if values.dtype.kind not in "OTU":
        return np.unique(values, return_inverse=True)
    texts = values.tolist()
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.array([*numbers], object), np.fromiter(map(numbers.__getitem__, texts), np.int64, len(texts))


def _means_in_splits(
    dataset: xr.Dataset, axis: str, code: NDArray[np.int64], count: int
) -> tuple[xr.Dataset, NDArray[np.int64], NDArray[np.int64]]:
    """Means of each sample's rows in each split, in one pass; their split, and the first row of each."""
    numeric = [name for name, v in dataset.data_vars.items() if axis in v.dims and v.dtype.kind in "fiub"]
    if not numeric:
        raise DimensionError(
            f"there are no numbers on '{axis}' to summarise, only {', '.join(map(str, dataset.variables))}.",
            "Pass the result of an analysis, such as attention_mass(run).",
        )
    held = dataset[numeric]
    held = held.drop_vars([name for name in held.coords if axis in held[name].dims])
    if "sample_index" not in dataset.variables:
        return held, code, np.arange(len(code))
    spans = sample_spans(np.asarray(dataset["sample_index"].values))
    key = np.repeat(np.arange(len(spans.start)), spans.stop - spans.start) * count + code
    sorted_already = (np.diff(key) >= 0).all()
    order = np.arange(len(key)) if sorted_already else np.argsort(key, kind="stable")
    start = np.flatnonzero(np.diff(key[order], prepend=-1))
    groups = Groups(order, start, spans.start)
    means = {
        name: (
            [str(dim) if dim != axis else "sample" for dim in variable.dims],
            mean_of_groups(variable.data, variable.dims.index(axis), groups),
            variable.attrs,
        )
        for name, variable in held.data_vars.items()
    }
    first = order[start]
    return xr.Dataset(means, held.coords), code[first], first


def _means_and_intervals(
    values: NDArray[Any], members: Sequence[NDArray[np.int64]], interval: Any
) -> NDArray[np.float64]:
    """(..., split, statistic): mean, low, high."""
    values = np.asarray(values, np.float64)
    statistics = []
    for rows in members:
        part = values[..., rows]
        mean = part.mean(axis=-1) if len(rows) else np.full(part.shape[:-1], np.nan)
        statistics.append(np.stack([mean, *interval(part, rows)], axis=-1))
    return np.stack(statistics, axis=-2)


def _interval(
    values: NDArray[Any],
    rows: NDArray[np.int64],
    method: str,
    level: float,
    clusters: NDArray[Any] | None,
    resamples: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if method == "t":
        return t_interval(values, level=level)
    own = None if clusters is None else clusters[rows]
    return bootstrap_interval(values, level=level, clusters=own, resamples=resamples, seed=seed)


def _label(dataset: xr.Dataset, name: str, axis: str) -> xr.DataArray:
    if name not in dataset.variables or dataset[name].dims != (axis,):
        raise DimensionError(
            f"the rows have no label '{name}'; they have "
            f"{', '.join(str(n) for n, coord in dataset.coords.items() if coord.dims == (axis,))}.",
            f"Add a column of the samples first: with_samples(dataset, run, '{name}').",
        )
    return dataset[name]


def _sample_rows(dataset: xr.Dataset, count: int | None) -> tuple[str, Any]:
    """The axis of the rows, and the row in samples/ of each."""
    if "sample_index" in dataset.variables:
        return token_axis(dataset), dataset["sample_index"].data
    if "sample" in dataset.dims and count in (None, dataset.sizes["sample"]):
        return "sample", np.arange(dataset.sizes["sample"])
    raise DimensionError(
        f"these rows (dimensions {', '.join(map(str, dataset.dims)) or 'none'}) belong to no known sample.",
        "Keep their 'sample_index', or pass one row for each sample of the run.",
    )


def _look_up(values: NDArray[Any], index: Any) -> Any:
    if isinstance(index, da.Array):
        return da.map_blocks(_take, index, values=values, dtype=values.dtype)
    return np.asarray(values[np.asarray(index)])


def _take(index: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values[index])


def _unstack(flat: xr.Dataset, shape: dict[str, int]) -> xr.Dataset:
    variables = {}
    for name, variable in flat.data_vars.items():
        data = variable.transpose("split", ...).data.reshape((*shape.values(), *variable.shape[1:]))
        rest = tuple(dim for dim in variable.dims if dim != "split")
        variables[name] = ((*shape, *rest), data, variable.attrs)
    coords = {name: coord for name, coord in flat.coords.items() if "split" not in coord.dims}
    return xr.Dataset(variables, coords)
