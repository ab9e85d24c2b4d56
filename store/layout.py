"""How big chunks and shards are, and how they are encoded. The figures behind it are in FORMAT.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from .schema import ArraySchema

CHUNK_BYTES = 1 << 20
SHARD_BYTES = 64 << 20
SHARD_BYTES_MAX = 128 << 20
SHARD_ROWS_MIN = 2048
TABLE_ROWS = 1 << 16
BYTE_ROWS = 16 << 20
BLOSC_BLOCK = 1 << 19


@dataclass(frozen=True)
class Layout:
    """`chunk` is what one read decodes; `shard` is one file and one write."""

    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None


def layout(array: ArraySchema, axis: str) -> Layout:
    """Choose chunk and shard shapes for an array that grows along `axis`.

    Tables get plain chunks of 65,536 rows. Arrays with a layer dimension get chunks of one layer x 512 KiB
    to 1 MiB inside shards of a band of layers x at least 2,048 rows, 64 to 128 MiB where there is so much.
    """
    if "layer" not in array.dims:
        rows = BYTE_ROWS if array.dtype == "uint8" else TABLE_ROWS
        return Layout(array.shape(axis, rows), None)
    row = int(
        np.dtype(array.dtype).itemsize
        * np.prod([array.sizes[d] for d in array.dims if d not in ("layer", axis)])
    )
    layers = array.sizes["layer"]
    chunk_rows = 1 << max(0, int(math.log2(max(1, CHUNK_BYTES // row))))
    shard_rows = max(chunk_rows, -(-SHARD_ROWS_MIN // chunk_rows) * chunk_rows)
    band = max(1, min(layers, SHARD_BYTES_MAX // (shard_rows * row)))
    while shard_rows * row * band * 2 <= SHARD_BYTES // array.beside:
        shard_rows *= 2
    return Layout(_shape(array, axis, 1, chunk_rows), _shape(array, axis, band, shard_rows))


def _shape(array: ArraySchema, axis: str, layers: int, rows: int) -> tuple[int, ...]:
    return tuple({"layer": layers, axis: rows}.get(dim, array.sizes.get(dim, 0)) for dim in array.dims)


def compressors(dtype: str) -> list[BytesBytesCodec]:
    """Blosc zstd with an explicit block size (1.16x on float16, not 1.08x), and a checksum per chunk."""
    if dtype == "string":
        return [ZstdCodec(level=1), Crc32cCodec()]
    item = np.dtype(dtype).itemsize
    return [
        BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=item, blocksize=BLOSC_BLOCK),
        Crc32cCodec(),
    ]
