"""An array of a run on this disk, decoded chunk by chunk straight into the block that is asked for.

zarr-python takes twice the CPU time for the same bytes. It reads what was written in another way.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from .errors import CorruptError

Shape = tuple[int, ...]
# From where to where, along each dimension.
Box = tuple[slice, ...]

_DTYPES = ("float16", "float32", "int8", "int16", "int32", "int64", "uint8", "bool")
_FILL = {"f": "NaN", "i": -1, "u": 0, "b": False, "T": ""}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM = {"name": "crc32c"}
_INDEX = {"index_codecs": [_LITTLE, _CHECKSUM], "index_location": "end"}
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_ABSENT = np.iinfo(np.uint64).max
_BLOSC_HEADER = 16
_BLOSC, _ZSTD, _TEXT = Blosc(), Zstd(), VLenUTF8()


@dataclass(frozen=True)
class StoredArray(BackendArray):
    """A lazy array whose chunks are Blosc and a CRC-32C, in files of one shard or one chunk each.

    Nothing that a file says is believed before it was compared with its size and with the metadata.

    Raises
    ------
    CorruptError  when read: a file is cut, its checksum differs, or a chunk is not of its size.
    """

    folder: Path
    shape: Shape
    dtype: np.dtype[Any]
    fill_value: Any
    chunk: Shape
    shard: Shape | None
    attributes: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, metadata: Mapping[str, Any]) -> StoredArray | None:
        """The array in a folder, None unless its metadata is just what RunWriter makes it."""
        name, grid, codecs = metadata["data_type"], metadata["chunk_grid"], metadata["codecs"]
        if name not in (*_DTYPES, "string") or sys.byteorder != "little" or grid["name"] != "regular":
            return None
        if metadata["chunk_key_encoding"] != _KEYS or metadata.get("storage_transformers"):
            return None
        dtype: np.dtype[Any] = np.dtypes.StringDType() if name == "string" else np.dtype(name)
        fill = metadata["fill_value"]
        unit = chunk = grid["configuration"]["chunk_shape"]
        shard = None
        if codecs[0]["name"] == "sharding_indexed":
            settings = dict(codecs[0]["configuration"])
            chunk, shard, inner = settings.pop("chunk_shape"), tuple(unit), settings.pop("codecs")
            if len(codecs) > 1 or settings != _INDEX:
                return None
            codecs = inner
        plain = _LITTLE if dtype.itemsize > 1 else {"name": "bytes"}
        compressor = "blosc"
        if name == "string":
            plain, compressor = {"name": "vlen-utf8", "configuration": {}}, "zstd"
        between = [codec["name"] for codec in codecs[1:-1]]
        if (codecs[0], between, codecs[-1]) != (plain, [compressor], _CHECKSUM):
            return None
        if fill != _FILL[dtype.kind] or 0 in chunk:
            return None
        shape, attributes = tuple(metadata["shape"]), dict(metadata.get("attributes", {}))
        fill = fill if name == "string" else dtype.type(fill)
        return cls(folder, shape, dtype, fill, tuple(chunk), shard, attributes)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> NDArray[Any]:
        """Of numbers and slices that go forward, which is what xarray makes of any index."""
        rows = [
            range(*index.indices(size)) if isinstance(index, slice) else range(index, index + 1)
            for index, size in zip(key, self.shape, strict=True)
        ]
        box = tuple(slice(part[0], part[-1] + 1) if part else slice(0, 0) for part in rows)
        values = np.empty([part.stop - part.start for part in box], self.dtype)
        for place, piece in _cells(box, self.shard or self.chunk):
            self._read_file(place, piece, values, box)
        # The ellipsis keeps an array of no dimensions an array: of texts a str would come.
        return values[(*(slice(None, None, n.step) if isinstance(n, slice) else 0 for n in key), ...)]

    def _read_file(self, place: Shape, part: Box, values: NDArray[Any], box: Box) -> None:
        """Fill in `part` of the array, which lies in one file, of the values of `box`."""
        path = self.folder.joinpath("c", *map(str, place))
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            # A chunk of nothing but fill values is not stored.
            values[_moved(part, box)] = self.fill_value
            return
        try:
            file = _File(handle, path)
            spans = None if self.shard is None else file.index(self._chunks_of_shard())
            for chunk, piece in _cells(part, self.chunk):
                span = (0, file.size)
                if spans is not None:
                    offset, length = spans[tuple(np.mod(chunk, spans.shape[:-1]))]
                    span = (int(offset), int(length))
                self._decode(file, span, chunk, piece, values[_moved(piece, box)])
        finally:
            os.close(handle)

    def _chunks_of_shard(self) -> Shape:
        return tuple(whole // part for whole, part in zip(self.shard or (), self.chunk, strict=True))

    def _decode(
        self, file: _File, span: tuple[int, int], chunk: Shape, piece: Box, out: NDArray[Any]
    ) -> None:
        """Fill `out` with `piece` of the array, which lies in one chunk."""
        if span == (_ABSENT, _ABSENT):
            out[...] = self.fill_value
            return
        starts = (number * size for number, size in zip(chunk, self.chunk, strict=True))
        inner = _moved(piece, tuple(slice(start, None) for start in starts))
        if self.dtype.kind == "T":
            out[...] = file.texts(*span, self.chunk, inner[0].stop)[inner]
            return
        data = file.chunk(*span, math.prod(self.chunk) * self.dtype.itemsize)
        if out.shape == self.chunk and out.flags.c_contiguous:
            _BLOSC.decode(data, out)
            return
        whole = np.empty(self.chunk, self.dtype)
        _BLOSC.decode(data, whole)
        out[...] = whole[inner]


class _File:
    """An open file of chunks."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path
        self.size = os.fstat(handle).st_size

    def index(self, counts: Shape) -> NDArray[np.uint64]:
        """Offset and length of each chunk of a shard (*counts, 2)."""
        length = 16 * math.prod(counts) + 4
        index = self._checked(self.size - length, length)
        # What is left may hold chunks.
        self.size -= length
        return index.view("<u8").reshape(*counts, 2)

    def chunk(self, offset: int, length: int, decoded: int) -> NDArray[np.uint8]:
        """A chunk as Blosc made it, of so many bytes decoded."""
        data = self._checked(offset, length)
        sizes = data[:_BLOSC_HEADER].view("<u4") if len(data) >= _BLOSC_HEADER else np.zeros(4)
        if sizes[1] != decoded or sizes[3] != len(data):
            raise self._damaged(f"the chunk at byte {offset} does not hold {decoded} bytes")
        return data

    def texts(self, offset: int, length: int, shape: Shape, rows: int) -> NDArray[Any]:
        """The first rows of a chunk of texts: a chunk that is not full ends in empty ones."""
        checked = self._checked(offset, length)
        try:
            data = bytearray(_ZSTD.decode(checked))
            if int.from_bytes(data[:4], "little") != math.prod(shape):
                raise ValueError("another number of them")
            data[:4] = (rows * math.prod(shape[1:])).to_bytes(4, "little")
            texts: NDArray[Any] = _TEXT.decode(data)
        except (RuntimeError, ValueError) as cause:
            what = f"the chunk at byte {offset} does not hold {math.prod(shape)} texts"
            raise self._damaged(what) from cause
        return texts.reshape(rows, *shape[1:])

    def _checked(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Some bytes, less the checksum that ends them."""
        if offset < 0 or length < 4 or offset + length > self.size:
            raise self._damaged(f"it has {self.size} bytes, and more belong to it")
        data = np.frombuffer(os.pread(self._handle, length, offset), np.uint8)
        if len(data) != length or google_crc32c.value(data[:-4]) != int(data[-4:].view("<u4")[0]):
            raise self._damaged(f"the checksum of its bytes {offset} to {offset + length} differs")
        return data[:-4]

    def _damaged(self, what: str) -> CorruptError:
        return CorruptError(
            f"{self._path} is damaged: {what}.",
            "Copy the run again, or capture these samples again; `mechanistic verify` lists all damage.",
        )


def _cells(box: Box, size: Shape) -> Iterator[tuple[Shape, Box]]:
    """The cells of a grid that a box touches: their numbers, and the part of the box that is in each."""
    numbers = [range(part.start // step, -(-part.stop // step)) for part, step in zip(box, size, strict=True)]
    for place in product(*numbers):
        yield (
            place,
            tuple(
                slice(max(part.start, number * step), min(part.stop, (number + 1) * step))
                for part, number, step in zip(box, place, size, strict=True)
            ),
        )


def _moved(part: Box, box: Box) -> Box:
    """A part of a box, counted from where the box begins."""
    return tuple(
        slice(inner.start - outer.start, inner.stop - outer.start)
        for inner, outer in zip(part, box, strict=True)
    )
