"""One array that grows along one axis, written a whole shard at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .chunk_codec import ChunkCodec, Encoded, shard_index
from .chunk_file import write_file
from .errors import StoreError
from .node_metadata import METADATA, ArrayMetadata

ENCODERS_MAX = 8
# Most of their time is waiting for the disk to have it.
WRITERS = 8
# As much as glibc takes notice of.
KEPT_BYTES = 31 << 20

Array = NDArray[Any]
# Rows of an array. Those of one with layers may be one piece of memory a layer.
Values = Array | Sequence[Array]


def dimensions(array: zarr.Array[Any]) -> list[str]:
    """The dimension names of a stored array, in order."""
    return [str(name) for name in getattr(array.metadata, "dimension_names", None) or ()]


class Threads:
    """The threads in which a writer's chunks are encoded and its files written."""

    def __init__(self) -> None:
        # Freed once, this much makes the C library keep what is freed later. Else chunks are encoded into
        # pages new to the process, whose faults cost a tenth of the CPU time that compressing does.
        np.empty(KEPT_BYTES, np.uint8)
        self.encode = ThreadPoolExecutor(min(ENCODERS_MAX, os.cpu_count() or 1), "encode")
        self.write = ThreadPoolExecutor(WRITERS, "write-file")

    def close(self) -> None:
        self.encode.shutdown()
        self.write.shutdown()

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GrowingArray:
    """Rows fill a chunk of every layer; full chunks are encoded, and a full shard becomes one file.

    What it holds is bounded: raw rows of one chunk, the encoded chunks of one shard, and of another that is
    being written. Every write is of a whole file, the last one padded with the fill value: nothing on disk
    is changed in place, and equal rows give equal files. The stored shape follows at the commit.
    """

    def __init__(self, path: Path, axis: str, rows: int, threads: Threads) -> None:
        self.path = path
        told = ArrayMetadata.read(path)
        self.axis = told.dims.index(axis)
        self.unit, self.chunk, self.sharded = told.unit, told.chunk, told.sharded
        self.shard_rows, self.chunk_rows = self.unit[self.axis], self.chunk[self.axis]
        self.dtype, self.fill_value, self.shape = told.dtype, told.fill_value, told.shape
        # Files written since they were last asked for: size and CRC-32.
        self.written: dict[Path, tuple[int, int]] = {}
        self._codec = ChunkCodec(told.codecs, told.fill_value)
        self._threads = threads
        self._encoded: list[list[Future[Encoded]]] = []
        self._encoding: list[Future[Encoded]] = []
        self._writing: list[Future[Any]] = []
        self._dirty = False
        self.start = rows // self.shard_rows * self.shard_rows
        self.count = 0
        self.buffers = self._room()
        if rows > self.start:
            # The rows of the shard that is not full yet; encoded again, they are the same bytes.
            array = zarr.open_array(str(path), mode="r")
            held = np.asarray(array[(slice(None),) * self.axis + (slice(self.start, rows),)])
            self.append(held.astype(object) if self.dtype == "string" else held)
            self._dirty = False

    @property
    def rows(self) -> int:
        return self.start + self.count

    def append(self, *pieces: Values) -> None:
        """Add rows, piece after piece, which must not change until `encoded` returns.

        A dtype or a fixed dimension that differs raises, since a cast would be silent.
        """
        blocks = [self._layers(values) for values in pieces]
        if not self.axis and len(blocks) > 1:
            # A table has many short columns, whose calls cost more than their bytes.
            blocks = [[np.concatenate([rows for (rows,) in blocks])]]
        for layers in blocks:
            self._append(layers)

    def _append(self, layers: list[Array]) -> None:
        done, total = 0, len(layers[0])
        while done < total:
            filled = self.count % self.chunk_rows
            step = min(total - done, self.chunk_rows - filled)
            block = [layer[done : done + step] for layer in layers]
            if step < self.chunk_rows:
                if not filled:
                    self.encoded()
                for buffer, rows in zip(self.buffers, block, strict=True):
                    buffer[filled : filled + step] = rows
                block = self.buffers
            self._dirty = True
            self.count += step
            done += step
            if filled + step == self.chunk_rows:
                self._encoded.append(self._encode(block))
            if self.count == self.shard_rows:
                self._write(self._encoded)
                self._encoded = []
                self.start += self.shard_rows
                self.count = 0

    def encoded(self) -> None:
        """Wait until every full chunk is encoded: the rows that were given are not needed any more."""
        encoding, self._encoding = self._encoding, []
        for chunk in encoding:
            chunk.result()

    def flush(self) -> None:
        """Start writing every row that is not on disk yet; `settle` waits for it."""
        if not self._dirty or not self.count:
            return
        chunks = list(self._encoded)
        filled = self.count % self.chunk_rows
        if filled:
            for buffer in self.buffers:
                buffer[filled:] = self.fill_value
            chunks.append(self._encode(self.buffers))
        self._write(chunks)

    def settle(self) -> None:
        """Wait until every row is on disk, then start giving the array its true length; `wait` again."""
        self.wait()
        if self.shape[self.axis] != self.rows:
            metadata = json.loads((self.path / METADATA).read_bytes())
            metadata["shape"][self.axis] = self.rows
            text = json.dumps(metadata, indent=2).encode()
            self._writing.append(self._threads.write.submit(write_file, self.path / METADATA, [text]))
            self.shape = tuple(metadata["shape"])

    def wait(self) -> None:
        """Wait until every file that was begun is whole."""
        writing, self._writing = self._writing, []
        for file in writing:
            file.result()

    def rows_in(self, values: Values) -> int:
        """How many rows are in what `append` takes."""
        return len(values[0]) if self.axis else len(values)

    def _layers(self, values: Values) -> list[Array]:
        """The rows of each layer; of an array without layers, all of them."""
        layers = list(values) if self.axis else [np.asarray(values)]
        lead, own = self.shape[: self.axis], self.shape[self.axis + 1 :]
        have = {("string" if each.dtype.kind in "UTO" else str(each.dtype), each.shape) for each in layers}
        kinds = {(len(layers), dtype, shape[1:]) for dtype, shape in have}
        if len(have) != 1 or kinds != {(*(lead or (1,)), self.dtype, own)}:
            got = " and ".join(
                f"{dtype} {(len(layers),) * self.axis + shape}" for dtype, shape in sorted(have)
            )
            raise StoreError(
                f"{self.path.name} takes {self.dtype} {(*lead, -1, *own)}; these rows are {got}.",
                "Nothing is cast in silence: give the array the dtype and dimensions of its schema.",
            )
        return layers

    def _room(self) -> list[Array]:
        shape = (self.chunk_rows, *self.shape[self.axis + 1 :])
        layers = self.shape[0] if self.axis else 1
        return [np.empty(shape, object if self.dtype == "string" else self.dtype) for _ in range(layers)]

    def _encode(self, layers: Sequence[Array]) -> list[Future[Encoded]]:
        """Start encoding one chunk of every layer."""
        begun = [self._threads.encode.submit(self._codec.encode, layer) for layer in layers]
        self._encoding += begun
        return begun

    def _write(self, chunks: list[list[Future[Encoded]]]) -> None:
        """Start writing the shard's files, once those of the shard before are whole."""
        self.wait()
        self._dirty = False
        band = self.unit[0] if self.axis else 1
        layers = self.shape[0] if self.axis else 1
        index = [0] * len(self.unit)
        index[self.axis] = self.start // self.shard_rows
        for number, first in enumerate(range(0, layers, band)):
            if self.axis:
                index[0] = number
            file = self.path.joinpath("c", *map(str, index))
            of_band = [
                [chunk[layer] for chunk in chunks] for layer in range(first, min(first + band, layers))
            ]
            self._writing.append(self._threads.write.submit(self._write_file, file, of_band, band))

    def _write_file(self, file: Path, layers: list[list[Future[Encoded]]], band: int) -> None:
        """Layer by layer, so that one layer of all rows is one read."""
        room = self.shard_rows // self.chunk_rows
        chunks: list[Encoded] = []
        for layer in layers:
            chunks += [chunk.result() for chunk in layer]
            chunks += [None] * (room - len(layer))
        chunks += [None] * (band * room - len(chunks))
        pieces = [piece for chunk in chunks if chunk is not None for piece in chunk]
        # A chunk of nothing but fill values is not stored; absence is its correct encoding.
        if pieces:
            self.written[file] = write_file(file, [*pieces, shard_index(chunks)] if self.sharded else pieces)
