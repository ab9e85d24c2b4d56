"""Split results by what is known of samples and tokens; summarise each split with its interval and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .take_rows import take_rows
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
        added[name] = (axis, _look_up(np.asarray(column.values), index), column.attrs)
    return dataset.assign_coords(added)


def captured_samples(run: xr.DataTree) -> NDArray[np.int64]:
    """The rows of samples/ that were captured: not those that failed, even if a later row made them good."""
    samples = group(run, "samples")
    if "status" not in samples.variables:
        return np.arange(samples.sizes["sample"])
    return np.flatnonzero(np.asarray(samples["status"].values) == STATUS["ok"])


def sample_means(dataset: xr.Dataset) -> xr.Dataset:
    """Average the token rows of each sample; lazy.

    Returns
    -------
    the variables with a token axis, that axis replaced by `sample`, one entry for each sample that has rows;
    `sample_index` says which. NaN where any row is NaN.

    Raises
    ------
    DimensionError  there is no token axis.
    DataError       the rows are not in dataset order.
    """
    axis = token_axis(dataset)
    spans = sample_spans(np.asarray(dataset["sample_index"].values))
    variables = {}
    for name, variable in dataset.data_vars.items():
        if axis not in variable.dims:
            continue
        place = variable.dims.index(axis)
        dims = tuple("sample" if dim == axis else dim for dim in variable.dims)
        variables[name] = (dims, _mean_by_span(variable.data, spans.start, place), variable.attrs)
    coords = {name: coord for name, coord in dataset.coords.items() if axis not in coord.dims}
    result = xr.Dataset(variables, coords, dataset.attrs)
    return result.assign_coords(sample_index=("sample", spans.sample.astype(np.int32)))


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
    labels = [_labels_of_rows(dataset, name, axis) for name in names]
    splits = [split_names(dataset[name], values) for name, values in zip(names, labels, strict=True)]
    summary_of = _summary_of_rows(dataset, axis, method, level, clusters, resamples, seed)
    parts = []
    for combination in np.ndindex(*(len(split) for split in splits)):
        chosen = np.ones(dataset.sizes[axis], bool)
        for values, split, place in zip(labels, splits, combination, strict=True):
            chosen &= values == split[place]
        parts.append(summary_of(np.flatnonzero(chosen)))
    if not names:
        return parts[0].assign_attrs(dataset.attrs)
    flat = xr.concat(parts, "split", coords="minimal", compat="override")
    shape = dict(zip(names, map(len, splits), strict=True))
    table = _unstack(flat, shape)
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


def _summary_of_rows(
    dataset: xr.Dataset,
    axis: str,
    method: str,
    level: float,
    clusters: str | None,
    resamples: int,
    seed: int,
) -> Callable[[NDArray[np.int64]], xr.Dataset]:
    """A function from the rows of a split to its summary."""
    grouping = None if clusters is None else _labels_of_rows(dataset, clusters, axis)
    numeric = [name for name, v in dataset.data_vars.items() if axis in v.dims and v.dtype.kind in "fiub"]
    if not numeric:
        raise DimensionError(
            f"there are no numbers on '{axis}' to summarise, only {', '.join(map(str, dataset.variables))}.",
            "Pass the result of an analysis, such as attention_mass(run).",
        )
    held = dataset[numeric]
    # Of the labels only the sample is asked for: taking rows of each costs more than reading the numbers.
    held = held.drop_vars(
        [name for name in held.coords if axis in held[name].dims and name != "sample_index"]
    )

    def summary(rows: NDArray[np.int64]) -> xr.Dataset:
        part = take_rows(held, axis, rows)
        if not len(rows):
            # There is nothing to read, and dask has no blocks of no rows.
            part = xr.zeros_like(part).compute()
        firsts: Any = slice(None)
        if "sample_index" in part.variables:
            firsts = sample_spans(np.asarray(part["sample_index"].values)).start
            part = sample_means(part)
        interval = partial(t_interval, level=level)
        if method == "bootstrap":
            groups = None if grouping is None else grouping[rows][firsts]
            interval = partial(
                bootstrap_interval, level=level, clusters=groups, resamples=resamples, seed=seed
            )
        return _summary_of_samples(part, interval)

    return summary


def _summary_of_samples(part: xr.Dataset, interval: Any) -> xr.Dataset:
    whole = part.chunk(sample=-1) if part.chunks else part
    variables: dict[str, Any] = {}
    for name, variable in whole.data_vars.items():
        computed = xr.apply_ufunc(
            partial(_mean_and_interval, interval=interval),
            variable,
            input_core_dims=[["sample"]],
            output_core_dims=[["statistic"]],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"output_sizes": {"statistic": 3}},
        )
        for place, suffix in enumerate(("", "_low", "_high")):
            variables[f"{name}{suffix}"] = computed.isel(statistic=place).assign_attrs(variable.attrs)
    variables["n_sample"] = xr.DataArray(np.int64(part.sizes["sample"]), attrs={"units": "sample"})
    return xr.Dataset(variables)


def _mean_and_interval(values: NDArray[Any], interval: Any) -> NDArray[np.float64]:
    values = np.asarray(values, np.float64)
    mean = values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
    return np.stack([mean, *interval(values)], axis=-1)


def _labels_of_rows(dataset: xr.Dataset, name: str, axis: str) -> NDArray[Any]:
    if name not in dataset.variables or dataset[name].dims != (axis,):
        raise DimensionError(
            f"the rows have no label '{name}'; they have "
            f"{', '.join(str(n) for n, coord in dataset.coords.items() if coord.dims == (axis,))}.",
            f"Add a column of the samples first: with_samples(dataset, run, '{name}').",
        )
    return row_labels(dataset[name])


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


def _mean_by_span(values: Any, start: NDArray[np.int64], place: int) -> Any:
    """Means over the rows from each start to the next, on axis `place`."""
    if not isinstance(values, da.Array):
        return _reduce_spans(np.asarray(values), start, place)
    dtype = np.result_type(values.dtype, np.float32)
    edges = np.cumsum(values.chunks[place])
    # A block ends where the sample ends that its last row belongs to.
    firsts = np.unique(np.searchsorted(start, np.concatenate([[0], edges[:-1]]), side="left"))
    firsts = firsts[firsts < len(start)]
    row_edges = np.append(start[firsts], values.shape[place])
    rows = tuple(np.diff(row_edges).tolist())
    counts = tuple(np.diff(np.append(firsts, len(start))).tolist())
    local = np.concatenate([start[a : a + n] - start[a] for a, n in zip(firsts, counts, strict=True)])
    dims = tuple(range(values.ndim))
    starts = da.from_array(local, chunks=(counts,))
    return da.blockwise(
        partial(_reduce_spans, place=place),
        dims,
        values.rechunk({place: rows}),
        dims,
        starts,
        (place,),
        adjust_chunks={place: counts},
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0,) * values.ndim, dtype),
    )


def _reduce_spans(values: NDArray[Any], start: NDArray[np.int64], place: int) -> NDArray[Any]:
    counts = np.diff(np.append(start, values.shape[place]))
    shape = [1] * values.ndim
    shape[place] = -1
    sums = np.add.reduceat(values, start, axis=place, dtype=np.float64)
    return np.asarray(sums / counts.reshape(shape)).astype(np.result_type(values.dtype, np.float32))


def _unstack(flat: xr.Dataset, shape: dict[str, int]) -> xr.Dataset:
    variables = {}
    for name, variable in flat.data_vars.items():
        data = variable.transpose("split", ...).data.reshape((*shape.values(), *variable.shape[1:]))
        rest = tuple(dim for dim in variable.dims if dim != "split")
        variables[name] = ((*shape, *rest), data, variable.attrs)
    coords = {name: coord for name, coord in flat.coords.items() if "split" not in coord.dims}
    return xr.Dataset(variables, coords)
