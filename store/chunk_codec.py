"""How the chunks of an array are encoded, as its own metadata says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd
from numpy.typing import NDArray

from .errors import FormatError

# A chunk as it is stored, in pieces that follow each other; None for one of nothing but fill values.
Encoded = tuple[bytes, ...] | None

_SHUFFLE = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


class ChunkCodec:
    """Encodes chunks with one compressor and a CRC-32C, the codecs that `layout.compressors` chooses.

    Straight through numcodecs, which lets other threads run meanwhile: zarr-python's way costs three times
    the CPU, tensorstore's twice.

    Raises
    ------
    FormatError    the array was made by another writer, with other codecs.
    """

    def __init__(self, codecs: Sequence[Mapping[str, Any]], fill_value: Any) -> None:
        names = [codec["name"] for codec in codecs]
        if names not in (["bytes", "blosc", "crc32c"], ["vlen-utf8", "zstd", "crc32c"]):
            raise FormatError(
                f"An array is encoded with {', '.join(names)}, which this writer does not do.",
                "Another writer made this run: continue it with that one, or capture afresh.",
            )
        self.strings = names[0] == "vlen-utf8"
        settings = codecs[1]["configuration"]
        self._fill = fill_value
        self._text = VLenUTF8()
        self._compressor: Any = (
            Zstd(settings["level"], settings["checksum"])
            if self.strings
            else Blosc(
                settings["cname"],
                settings["clevel"],
                _SHUFFLE[settings["shuffle"]],
                settings["blocksize"],
                typesize=settings["typesize"],
            )
        )

    def encode(self, chunk: NDArray[Any]) -> Encoded:
        """The chunk's bytes: compressed, then their checksum."""
        if self._is_fill(chunk):
            return None
        plain = (
            self._text.encode(np.asarray(chunk, object).ravel())
            if self.strings
            else np.ascontiguousarray(chunk)
        )
        data: bytes = self._compressor.encode(plain)
        return data, checksum(data)

    def _is_fill(self, chunk: NDArray[Any]) -> bool:
        """Compared bit by bit: a NaN or a zero that differs from the fill value is data."""
        if self.strings:
            return all(value == self._fill for value in chunk.flat)
        unit = f"u{chunk.itemsize}"
        fill = np.asarray(self._fill, chunk.dtype).view(unit)
        first = chunk[(0,) * chunk.ndim]
        return bool(first.view(unit) == fill) and bool((chunk.view(unit) == fill).all())


def checksum(data: bytes) -> bytes:
    """CRC-32C, as Zarr's codec of that name appends it."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def shard_index(chunks: Sequence[Encoded]) -> bytes:
    """What ends a shard: offset and length of each of its chunks, in order, and a checksum."""
    index = np.full((len(chunks), 2), np.iinfo(np.uint64).max, np.uint64)
    offset = 0
    for number, chunk in enumerate(chunks):
        if chunk is not None:
            length = sum(map(len, chunk))
            index[number] = offset, length
            offset += length
    data = index.astype("<u8").tobytes()
    return data + checksum(data)
