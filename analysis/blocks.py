"""Walk a run in blocks that never cut a sample and never exceed a bound in bytes.

Shards cut samples wherever they fill up; attention must not. `align_blocks` regroups the rows of q and the
(complete) rows of k into dask blocks whose boundaries fall between samples, block i of q and block i of k
holding the same samples; `map_blocks` calls a kernel on each pair. Nothing is read until it is computed, and
any dask scheduler will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.array.core import slices_from_chunks
from dask.base import optimize, tokenize
from dask.local import get_sync
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .token_selection import token_axis

MAX_BYTES = 64 << 20
ROW_BLOCK = 64

# kernel(layer, query, key, query_columns, key_columns) -> one row for each query row (or each sample)
Columns = Mapping[str, NDArray[Any]]
BlockKernel = Callable[[int, NDArray[Any], NDArray[Any], Columns, Columns], NDArray[Any]]


@dataclass(frozen=True)
class SampleSpans:
    """Where each sample's rows lie on a token axis: `sample[i]` has the rows start[i] to stop[i]."""

    sample: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]


@dataclass(frozen=True)
class AlignedBlocks:
    """Queries and keys whose dask blocks pair up, and the number of samples in each block."""

    query: xr.DataArray
    key: xr.DataArray
    samples: tuple[int, ...]


def sample_spans(owner: NDArray[Any]) -> SampleSpans:
    """Find the rows of each sample from the sample index of every row.

    Raises
    ------
    DataError  the rows of a sample are not all together and in order.
    """
    owner = np.asarray(owner).astype(np.int64)
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    sample = owner[start]
    if (np.diff(sample) <= 0).any() or (sample < 0).any():
        raise DataError(
            "the rows of these samples are not in dataset order, so a sample's rows are not all together.",
            "Select rows with isel and sorted indices; a run keeps them in order.",
        )
    return SampleSpans(sample, start, np.append(start[1:], owner.size).astype(np.int64))


def align_blocks(query: xr.DataArray, key: xr.DataArray, *, max_bytes: int = MAX_BYTES) -> AlignedBlocks:
    """Regroup q (layer, token, head, d_head) and k (layer, token, kv_head, d_head) into whole-sample blocks.

    Both keep their coordinates. Samples without query rows are left out of the keys; every other sample keeps
    all of its keys. A block, with the piece of the pattern that its samples need at one time, stays within
    `max_bytes` for one layer.

    Raises
    ------
    DataError  one sample alone exceeds `max_bytes`, or has queries but no keys; rows are out of order.
    """
    query_axis, key_axis = _axis(query), _axis(key)
    rows, keys = _paired_spans(query, key)
    cost = _Cost.of(query, key)
    bounds = _block_bounds(cost, rows, keys, max_bytes)
    blocks = list(pairwise(bounds))
    wanted = _ranges(keys.start, keys.stop)
    if wanted != [(0, key.sizes[key_axis])]:
        key = key.isel({key_axis: np.concatenate([np.arange(*part) for part in wanted] or [np.arange(0)])})
    counts = keys.stop - keys.start
    return AlignedBlocks(
        _regrouped(query, query_axis, [int((rows.stop - rows.start)[a:b].sum()) for a, b in blocks]),
        _regrouped(key, key_axis, [int(counts[a:b].sum()) for a, b in blocks]),
        tuple(b - a for a, b in blocks),
    )


def map_blocks(
    kernel: BlockKernel,
    blocks: AlignedBlocks,
    *,
    query_columns: Sequence[str] = (),
    key_columns: Sequence[str] = (),
    shape: tuple[int, ...],
    per: str = "token",
    dtype: Any = np.float32,
) -> Any:
    """Apply `kernel` to every layer of every block: a dask array (layer, token or sample, *shape).

    The kernel gets the layer's number, the block's q (row, head, d_head) and k (row, kv_head, d_head), and
    the named columns of both, always with `sample_index`; it returns an array (row, *shape), with a row
    for each query row, or for each sample of the block if `per` is "sample".
    """
    query, key = blocks.query, blocks.key
    query_columns = tuple(dict.fromkeys(("sample_index", *query_columns)))
    key_columns = tuple(dict.fromkeys(("sample_index", *key_columns)))
    row_chunks, key_chunks = query.chunksizes[_axis(query)], key.chunksizes[_axis(key)]
    columns = [_column(query, name, row_chunks) for name in query_columns]
    columns += [_column(key, name, key_chunks) for name in key_columns]
    layers = da.from_array(np.asarray(query["layer"].values), chunks=1)
    extra = tuple(range(10, 10 + len(shape)))
    arguments: list[Any] = [layers, (0,), query.data, (0, 1, 2, 3), key.data, (0, 1, 4, 5)]
    for values in columns:
        arguments += [values, (1,)]
    return da.blockwise(
        _call_kernel,
        (0, 1, *extra),
        *arguments,
        kernel=kernel,
        query_columns=query_columns,
        key_columns=key_columns,
        new_axes=dict(zip(extra, shape, strict=True)),
        adjust_chunks={1: blocks.samples} if per == "sample" else None,
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0,) * (2 + len(shape)), dtype),
    )


def _call_kernel(
    layers: NDArray[Any],
    queries: list[list[NDArray[Any]]],
    keys: list[list[NDArray[Any]]],
    *columns: NDArray[Any],
    kernel: BlockKernel,
    query_columns: tuple[str, ...],
    key_columns: tuple[str, ...],
) -> NDArray[Any]:
    # Blocks have all heads and features: for dask to join its lists of one would copy them.
    [[query]], [[key]] = queries, keys
    of_query = dict(zip(query_columns, columns, strict=False))
    of_key = dict(zip(key_columns, columns[len(query_columns) :], strict=True))
    results = [
        kernel(int(layer), query[place], key[place], of_query, of_key) for place, layer in enumerate(layers)
    ]
    return np.stack(results)


@dataclass(frozen=True)
class _Cost:
    """Bytes that a block of one layer takes: as stored, and the float32 copies and scores of one sample."""

    query_row: int
    key_row: int
    pair: int

    @classmethod
    def of(cls, query: xr.DataArray, key: xr.DataArray) -> _Cost:
        query_row, key_row = (array.isel(layer=0, drop=True) for array in (query, key))
        elements = [math.prod(array.shape[1:]) for array in (query_row, key_row)]
        group = max(1, query.sizes["head"] // key.sizes["kv_head"])
        return cls(elements[0] * query.dtype.itemsize, elements[1] * key.dtype.itemsize, 3 * 4 * group)

    def stored(self, rows: int, keys: int) -> int:
        return rows * self.query_row + keys * self.key_row

    def working(self, rows: int, keys: int) -> int:
        return 2 * self.stored(rows, keys) + min(rows, ROW_BLOCK) * keys * self.pair


def _block_bounds(cost: _Cost, rows: SampleSpans, keys: SampleSpans, max_bytes: int) -> list[int]:
    """Where blocks begin and end, counted in samples: as many samples as fit, at least one."""
    bounds, stored, working = [0], 0, 0
    for place in range(len(rows.sample)):
        size = int(rows.stop[place] - rows.start[place]), int(keys.stop[place] - keys.start[place])
        own, peak = cost.stored(*size), cost.working(*size)
        if own + peak > max_bytes:
            raise DataError(
                f"sample {rows.sample[place]} needs {_mib(own + peak)} a layer, not {_mib(max_bytes)}.",
                f"Pass max_bytes={2 * (own + peak)}, or fewer query tokens, such as tokens='last'.",
            )
        if stored and stored + own + max(working, peak) > max_bytes:
            bounds.append(place)
            stored = working = 0
        stored, working = stored + own, max(working, peak)
    return [*bounds, len(rows.sample)]


def _paired_spans(query: xr.DataArray, key: xr.DataArray) -> tuple[SampleSpans, SampleSpans]:
    rows = sample_spans(np.asarray(query["sample_index"].values))
    keys = sample_spans(np.asarray(key["sample_index"].values))
    place = np.searchsorted(keys.sample, rows.sample)
    found = place < len(keys.sample)
    found[found] = keys.sample[place[found]] == rows.sample[found]
    if not found.all():
        raise DataError(
            f"sample {rows.sample[~found][0]} has queries but no keys.",
            "The two groups must come from one run: pass q and k as captured.",
        )
    return rows, SampleSpans(rows.sample, keys.start[place], keys.stop[place])


def _ranges(start: NDArray[np.int64], stop: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join spans that touch."""
    new = np.flatnonzero(start[1:] != stop[:-1]) + 1
    return [
        (int(part[0]), int(last[-1]))
        for part, last in zip(np.split(start, new), np.split(stop, new), strict=True)
        if part.size
    ]


def _regrouped(array: xr.DataArray, axis: str, rows: list[int]) -> xr.DataArray:
    """The array in blocks of one layer x these rows, each read by one task of its own.

    As tasks of the same graph, dask would read the pieces of many blocks before it works on the first.
    """
    values = array.data
    if not isinstance(values, da.Array):
        return array.chunk({axis: tuple(rows), "layer": 1})
    read = da.blockwise(
        _Source(values, np.cumsum([0, *rows])),
        (0, 1, 2, 3),
        da.from_array(np.arange(values.shape[0]), chunks=1),
        (0,),
        da.from_array(np.arange(len(rows)), chunks=1),
        (1,),
        name=f"regrouped-{tokenize(values.name, rows)}",
        new_axes={2: values.shape[2], 3: values.shape[3]},
        adjust_chunks={1: tuple(rows)},
        dtype=values.dtype,
        meta=values._meta,
    )
    labels = {
        name: label.variable.chunk({axis: tuple(rows)}) if axis in label.dims else label
        for name, label in array.coords.items()
    }
    return xr.DataArray(read, labels, array.dims, array.name, array.attrs)


@dataclass(frozen=True)
class _Source:
    """A lazy array, of which a task reads its own rows."""

    array: da.Array
    edges: NDArray[np.int64]

    def __call__(self, layer: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[Any]:
        rows = slice(self.edges[block[0]], self.edges[block[0] + 1])
        [part] = optimize(self.array[layer[0] : layer[0] + 1, rows])
        values = np.empty(part.shape, part.dtype)
        # One after the other: dask would hold all the pieces while it joins them.
        for place, where in zip(np.ndindex(part.numblocks), slices_from_chunks(part.chunks), strict=True):
            values[where] = get_sync(part.dask, (part.name, *place))
        return values


def _column(array: xr.DataArray, name: str, chunks: tuple[int, ...]) -> Any:
    return da.asarray(array[name].data).rechunk((chunks,))


def _axis(array: xr.DataArray) -> str:
    return token_axis(array.to_dataset(name="values"))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.3g} MiB"
