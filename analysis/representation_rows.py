"""The rows that an analysis of representations reads: one array (layer, row, feature) with its labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import site as site_of
from mechanistic.store import sites
from mechanistic.store.errors import DimensionError

from .finite import require_finite
from .head_rows import heads_as_layers
from .single_precision import to_single
from .splits import captured_samples, with_samples
from .take_rows import take_rows
from .token_selection import select_layers, select_tokens, token_axis

MAX_BYTES = 256 << 20
BLOCK_ROWS = 2048
BLOCK_BYTES = 64 << 20
MIN_BLOCK_ROWS = 64

Representations = xr.DataTree | xr.Dataset | xr.DataArray


def representation_rows(
    data: Representations,
    *,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    labels: Iterable[str] = (),
    heads: bool = False,
) -> xr.DataArray:
    """Choose the rows of a run, or check that an array already is such rows; lazy.

    Parameters
    ----------
    data
        A run; or a Dataset with one floating array (layer, row, feature), or that array itself, whose
        coordinates on the row axis are its labels.
    site, tokens, layer
        Which rows of a run, see `select_tokens`; rows of failed samples are left out.
    labels
        Columns of samples/ to attach to the rows of a run.
    heads
        Whether the array may be (layer, row, head, feature), see `heads_as_layers`.

    Returns
    -------
    array (layer, row, feature) with `sample_index` on its row axis wherever samples are known.

    Raises
    ------
    MissingSiteError, SpecificationError
                    no such site, layer or token selection.
    DimensionError  no such label, or the array is not (layer, row, feature).
    """
    rows: xr.Dataset | xr.DataArray
    rows = _from_run(data, site, tokens, labels) if isinstance(data, xr.DataTree) else data
    array = _only_array(rows) if isinstance(rows, xr.Dataset) else rows
    if array.ndim not in ((3, 4) if heads else (3,)) or array.dims[0] != "layer":
        raise DimensionError(
            f"these must be (layer, row, feature), but are ({', '.join(map(str, array.dims))}).",
            "Choose one head (isel(head=0)), or make one feature axis: stack(feature=['head', 'd_head']).",
        )
    named = array.to_dataset(name="representation")
    for name in labels:
        if name not in named.variables or named[name].dims != (array.dims[1],):
            held = [str(key) for key, coord in array.coords.items() if coord.dims == (array.dims[1],)]
            raise DimensionError(
                f"these rows have no label '{name}'; they have {', '.join(held) or 'none'}.",
                "Attach it as a coordinate of the rows, or pass the run and name a column of its samples.",
            )
    if array.dims[1] == "sample" and "sample_index" not in array.coords:
        named = named.assign_coords(sample_index=("sample", np.arange(array.sizes["sample"])))
    values = named["representation"].variable
    if values.chunks is not None:
        # Labels are cut like the rows, so that what is computed from both has one chunking.
        cut = {array.dims[1]: values.chunks[1]}
        lazy = {name: coord for name, coord in named.coords.items() if coord.chunks is not None}
        named = named.assign_coords({name: coord.chunk(cut) for name, coord in lazy.items()})
    chosen = select_layers(named, layer)["representation"]
    return heads_as_layers(chosen) if chosen.ndim == 4 else chosen


def _from_run(run: xr.DataTree, site: str, tokens: str | None, labels: Iterable[str]) -> xr.Dataset:
    # The last prompt token, the commonest read, has a small group of its own where it was captured.
    name = f"{site}_last" if tokens == "last" and f"{site}_last" in sites(run) else site
    rows = site_of(run, name)
    if name == site:
        rows = select_tokens(rows, tokens)
    rows = with_samples(rows, run, [label for label in dict.fromkeys(labels) if label not in rows.variables])
    axis, owner = "sample", np.arange(rows.sizes.get("sample", 0), dtype=np.int32)
    if "sample_index" in rows.variables:
        axis, owner = token_axis(rows), np.asarray(rows["sample_index"].values)
    # In memory, as it is asked for again and again.
    rows = rows.assign_coords(sample_index=(axis, owner))
    good = np.isin(owner, captured_samples(run))
    return rows if good.all() else take_rows(rows, axis, np.flatnonzero(good))


def _only_array(rows: xr.Dataset) -> xr.DataArray:
    arrays = [array for array in rows.data_vars.values() if array.dtype.kind == "f" and "layer" in array.dims]
    if len(arrays) != 1:
        held = ", ".join(f"{array.name} {tuple(array.dims)}" for array in arrays) or "none"
        raise DimensionError(
            f"these data must hold one floating array (layer, row, feature); they hold {held}.",
            "Pass the array itself: dataset['name'].",
        )
    return arrays[0]


def sample_numbers(rows: xr.DataArray) -> NDArray[np.int64]:
    """The row in samples/ of each row, or its own number where samples are not known."""
    if "sample_index" in rows.coords:
        return np.asarray(rows["sample_index"].values).astype(np.int64)
    return np.arange(rows.shape[1])


def layer_numbers(rows: xr.DataArray) -> list[int]:
    """The true layer numbers, or positions where there are none."""
    if "layer" in rows.coords:
        return [int(number) for number in rows["layer"].values]
    return list(range(rows.sizes["layer"]))


def row_chunks(values: da.Array) -> da.Array:
    """The array in blocks of one layer x whole features, of as many rows as it has them stored in."""
    blocks: da.Array = values.rechunk({0: 1, **dict.fromkeys(range(2, values.ndim), -1)})
    most = max(1, BLOCK_BYTES // max(1, values.itemsize * int(np.prod(values.shape[2:]))))
    if max(blocks.chunks[1], default=0) > most:
        blocks = blocks.rechunk({1: most})
    return blocks


class RowBlocks:
    """Blocks (1, row, feature) of each layer, small enough to hold a few.

    `of(layer)` gives the blocks of a layer to one consumer, to be opened with `open_block` inside its task.
    While a layer's rows fit half of `max_bytes`, all consumers share them; beyond that each reads them again,
    so that nothing is held.
    """

    def __init__(self, values: Any, max_bytes: int) -> None:
        count, width = values.shape[1:]
        size = int(np.clip(BLOCK_BYTES // (4 * max(1, width)), MIN_BLOCK_ROWS, BLOCK_ROWS))
        if not isinstance(values, da.Array):
            # A name of its own: hashing the values to name them costs as much as some of their products.
            values = da.from_array(np.asarray(values), name=False)
        self.values = values.rechunk({0: 1, 1: min(size, max(1, count)), 2: -1})
        self.starts = [0, *np.cumsum(self.values.chunks[1]).tolist()]
        # The rows, and as much again that is made of them.
        self.held = 2 * 4 * count * width <= max_bytes
        self._shared = self.values.to_delayed() if self.held else None

    def of(self, layer: int) -> list[Any]:
        """The blocks of one layer, by its place on the layer axis: arguments for a delayed call."""
        if self._shared is not None:
            return list(self._shared[layer, :, 0])
        spans = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [UnreadBlock(self.values[layer : layer + 1, start:stop]) for start, stop in spans]


class UnreadBlock:
    """A lazy block that dask passes on unread; no other task can come to share what it reads."""

    def __init__(self, values: Any) -> None:
        self.values = values


def open_block(block: NDArray[Any] | UnreadBlock) -> NDArray[Any]:
    """The values (1, row, feature) of what `RowBlocks.of` gave to a task."""
    if isinstance(block, UnreadBlock):
        return np.asarray(block.values.compute(scheduler="synchronous"))
    return block


def finite_rows(block: NDArray[Any] | UnreadBlock, samples: NDArray[np.int64], layer: int) -> NDArray[Any]:
    """Open a block (1, row, feature) as rows in at least single precision; `samples` are those of its rows.

    Raises
    ------
    DataError  a value is NaN or infinite; names layer and sample.
    """
    opened = open_block(block)[0]
    values = opened if opened.dtype == np.float64 else to_single(opened)
    require_finite(values, samples[: len(values)], layer)
    return values
