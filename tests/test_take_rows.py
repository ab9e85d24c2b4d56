"""Rows taken of lazy groups as they are read."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from run_groups import with_groups
from synthetic_run import synthetic_run

from mechanistic.analysis import two_hop
from mechanistic.analysis.take_rows import take_rows
from mechanistic.store import site


def lazy(blocks: list[int]) -> tuple[xr.Dataset, list[int]]:
    """Twelve rows in blocks, and which of their blocks have been read."""
    read: list[int] = []

    def note(values: NDArray[Any]) -> NDArray[Any]:
        read.append(int(values[0, 0]) // 12)
        return values

    values = np.arange(24.0).reshape(2, 12)
    array = da.from_array(values, chunks=(1, tuple(blocks))).map_blocks(note, meta=values[:0, :0])
    labels = {"position": ("token", da.arange(12, chunks=(tuple(blocks),))), "layer": [3, 5]}
    return xr.Dataset({"x": (("layer", "token"), array, {"units": "1"})}, labels, {"site": "x"}), read


@pytest.mark.parametrize("rows", [[0], [11], [1, 2, 3, 4], [3, 3, 9], list(range(12)), [9, 1], []])
def test_take_rows__is_isel(rows: list[int]) -> None:
    dataset, _ = lazy([5, 4, 3])
    chosen = np.array(rows, int)
    taken = take_rows(dataset, "token", chosen)
    assert isinstance(taken["x"].data, da.Array)
    xr.testing.assert_identical(taken.compute(), dataset.isel(token=chosen).compute())


def test_take_rows__reads_blocks_with_such_rows_only() -> None:
    dataset, read = lazy([2] * 6)
    take_rows(dataset, "token", np.array([4, 5, 10]))["x"].compute()
    assert len(read) == 2 * 2
    assert take_rows(dataset, "token", np.arange(12))["x"].chunks[1] == (2,) * 6
    assert take_rows(dataset, "token", np.arange(0, 12, 2))["x"].chunks[1] == (2,) * 3


def test_two_hop__reads_no_block_ahead_of_its_work() -> None:
    """However long the run: a block is read, worked on and let go of before the next."""
    run = synthetic_run(chunk=7)
    events: list[str] = []

    def note(values: NDArray[Any]) -> NDArray[Any]:
        events.append("read")
        return values

    query = site(run, "text/q")
    noted = query["q"].copy(data=query["q"].data.map_blocks(note, meta=query["q"].data._meta))
    lazily = two_hop(with_groups(run, text__q=query.assign(q=noted)), max_bytes=12_000)

    def worked(values: NDArray[Any]) -> NDArray[Any]:
        events.append("work")
        return values

    direct = lazily["direct"].data
    assert direct.npartitions > 8
    with dask.config.set(scheduler="synchronous"):
        direct.map_blocks(worked, meta=direct._meta).compute()
    runs = "".join("r" if event == "read" else "w" for event in events).split("w")
    assert max(map(len, runs)) <= 6
