"""One array that grows along one axis, written a whole shard at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .errors import StoreError
from .layout import Layout, compressors, layout
from .schema import ArraySchema


def create_array(group: zarr.Group, schema: ArraySchema, axis: str) -> None:
    """Write the metadata of an empty array, chunked and encoded as the format says."""
    plan: Layout = layout(schema, axis)
    group.create_array(
        schema.name,
        shape=schema.shape(axis, 0),
        chunks=plan.chunk,
        shards=plan.shard,
        dtype="str" if schema.dtype == "string" else schema.dtype,
        compressors=compressors(schema.dtype),
        fill_value=schema.fill_value,
        dimension_names=list(schema.dims),
        attributes=dict(schema.attrs),
    )


def dimensions(array: zarr.Array[Any]) -> list[str]:
    """The dimension names of a stored array, in order."""
    return [str(name) for name in getattr(array.metadata, "dimension_names", None) or ()]


class GrowingArray:
    """Rows go into a buffer of one shard; a full buffer becomes one file, and a commit writes the rest.

    Two buffers an array at most: one fills while the other is encoded and written. Every write is of whole
    shards, the last one padded with the fill value: nothing on disk is read back or changed in place, and
    equal rows give equal files. The stored shape follows at the commit.
    """

    def __init__(self, path: Path, axis: str, rows: int) -> None:
        self.path = path
        array = zarr.open_array(str(path), mode="r+")
        self.axis = dimensions(array).index(axis)
        self.unit = array.shards or array.chunks
        self.shard_rows = self.unit[self.axis]
        self.dtype = "string" if array.dtype.kind in "TO" else str(array.dtype)
        self.fill_value = array.fill_value
        self.shape = array.shape
        self.start = rows // self.shard_rows * self.shard_rows
        self.count = rows - self.start
        self.touched: set[Path] = set()
        self._pending: Any = None
        self._store: Any = (_string_engine if self.dtype == "string" else _engine)(path, self.axis)
        self.buffer = self._room()
        self._spare: NDArray[Any] | None = None
        if self.count:
            self.buffer[self._rows(0, self.count)] = array[self._rows(self.start, rows)]

    @property
    def rows(self) -> int:
        return self.start + self.count

    def append(self, values: NDArray[Any]) -> None:
        """Add rows; a dtype or a fixed dimension that differs raises, since a cast would be silent."""
        self._check(values)
        done, total = 0, values.shape[self.axis]
        while done < total:
            step = min(total - done, self.shard_rows - self.count)
            self.buffer[self._rows(self.count, self.count + step)] = values[self._rows(done, done + step)]
            self.count += step
            done += step
            if self.count == self.shard_rows:
                self._write()
                self.start += self.shard_rows
                self.count = 0
                # The spare one was in flight until `_write` waited for it; fresh memory would cost more CPU.
                spare = self._room() if self._spare is None else self._spare
                self.buffer, self._spare = spare, self.buffer

    def flush(self) -> None:
        """Start writing every row that is not on disk yet; `settle` waits for it."""
        if self.count:
            self.buffer[self._rows(self.count, self.shard_rows)] = self.fill_value
            self._write()

    def settle(self) -> None:
        """Wait until every row is on disk, then give the array its true length."""
        self.wait()
        if self.shape[self.axis] != self.rows:
            shape = list(self.shape)
            shape[self.axis] = self.rows
            self.shape = tuple(shape)
            zarr.open_array(str(self.path), mode="r+").resize(self.shape)
            self.touched.add(self.path / "zarr.json")

    def wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _check(self, values: NDArray[Any]) -> None:
        got = "string" if values.dtype.kind in "UTO" else str(values.dtype)
        want, have = list(self.shape), list(values.shape)
        if len(want) == len(have):
            want[self.axis] = have[self.axis] = -1
        if got != self.dtype or want != have:
            raise StoreError(
                f"{self.path.name} takes {self.dtype} {tuple(want)}; these rows are {got} {tuple(have)}.",
                "Nothing is cast in silence: give the array the dtype and dimensions of its schema.",
            )

    def _room(self) -> NDArray[Any]:
        shape = list(self.shape)
        shape[self.axis] = self.shard_rows
        return np.empty(shape, object if self.dtype == "string" else self.dtype)

    def _rows(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self.axis + (slice(start, stop),)

    def _write(self) -> None:
        """Hand the buffer to the write engine; one write is in flight while the next shard fills."""
        self.wait()
        self.touched.update(self._files())
        region = self._rows(self.start, self.start + self.shard_rows)
        if self.dtype == "string":
            self._store[region] = self.buffer.astype(np.dtypes.StringDType())
        else:
            self._pending = self._store[region].write(self.buffer)

    def _files(self) -> list[Path]:
        """The chunk files that the buffer covers: every band of layers at one place on the growing axis."""
        index = [0] * len(self.unit)
        index[self.axis] = self.start // self.shard_rows
        files = []
        for band in range(-(-self.shape[0] // self.unit[0]) if self.axis else 1):
            if self.axis:
                index[0] = band
            files.append(self.path.joinpath("c", *map(str, index)))
        return files


# Longer than any run: the manifest bounds what is written, and the stored shape grows only at a commit.
ENDLESS = 1 << 40


def _engine(path: Path, axis: int) -> Any:
    """tensorstore, by measurement: it costs what the codec alone costs, syncs, and renames whole files."""
    import tensorstore

    metadata = json.loads((path / "zarr.json").read_bytes())
    metadata["shape"][axis] = ENDLESS
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": metadata,
        "assume_metadata": True,
        "recheck_cached_metadata": False,
        "open": True,
    }
    return tensorstore.open(spec).result()


def _string_engine(path: Path, axis: int) -> zarr.Array[Any]:
    """zarr-python, since the other engine knows no variable-length strings; it renames whole files too."""
    stored = zarr.open_array(str(path), mode="r+")
    shape = list(stored.shape)
    shape[axis] = ENDLESS
    metadata = replace(stored.metadata, shape=tuple(shape))
    return zarr.Array(replace(stored.async_array, metadata=metadata))
