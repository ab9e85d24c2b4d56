"""The write engine: what it writes, any Zarr reader reads; files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from mechanistic.store import ArraySchema
from mechanistic.store.chunk_codec import ChunkCodec
from mechanistic.store.chunk_file import STAGE_BYTES, write_file
from mechanistic.store.errors import FormatError
from mechanistic.store.growing import GrowingArray, Threads
from mechanistic.store.node_metadata import create_array

LAYERS, WIDTH = 5, 6


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads() as pools:
        yield pools


@pytest.fixture
def small_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, shards of 32 rows and two bands: of 3 layers, and of the other 2."""
    row = WIDTH * 4
    monkeypatch.setattr("mechanistic.store.layout.CHUNK_BYTES", 8 * row)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_ROWS_MIN", 32)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_BYTES_MAX", 3 * 32 * row)


def create(folder: Path, dtype: str = "float32") -> Path:
    schema = ArraySchema("x", ("layer", "token", "d"), dtype, {"layer": LAYERS, "d": WIDTH})
    folder.mkdir()
    create_array(folder / "x", schema, "token")
    return folder / "x"


def grow(path: Path, values: np.ndarray[Any, Any], steps: list[int], threads: Threads) -> GrowingArray:
    array = GrowingArray(path, "token", 0, threads)
    for start, stop in zip([0, *steps], [*steps, values.shape[1]], strict=True):
        array.append(values[:, start:stop])
        array.encoded()
    array.flush()
    array.settle()
    array.wait()
    return array


@pytest.mark.usefixtures("small_layout")
@pytest.mark.parametrize("steps", [[], [3, 11, 12, 40, 72], [32, 64], [100]])
def test_growing__other_readers_read_what_was_appended(
    tmp_path: Path, threads: Threads, steps: list[int]
) -> None:
    values = np.random.default_rng(0).standard_normal((LAYERS, 101, WIDTH)).astype(np.float32)
    # A chunk and a whole shard of nothing but fill values are not stored.
    values[2, 8:16] = np.nan
    values[:, 32:64] = np.nan
    path = create(tmp_path / "run")
    array = grow(path, values, steps, threads)
    assert (array.unit, array.chunk) == ((3, 32, WIDTH), (1, 8, WIDTH))
    held = zarr.open_array(str(path), mode="r")
    assert held.shape == values.shape
    np.testing.assert_array_equal(held[...], values)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)
    files = {file.relative_to(path).as_posix() for file in (path / "c").rglob("*") if file.is_file()}
    assert files == {f"c/{band}/{shard}/0" for band in (0, 1) for shard in (0, 2, 3)}
    for file, entry in array.written.items():
        data = file.read_bytes()
        assert entry == (len(data), zlib.crc32(data))


@pytest.mark.usefixtures("small_layout")
def test_growing__equal_rows_are_equal_files_wherever_it_resumed(tmp_path: Path, threads: Threads) -> None:
    values = np.random.default_rng(1).standard_normal((LAYERS, 75, WIDTH)).astype(np.float32)
    whole, broken = create(tmp_path / "whole"), create(tmp_path / "broken")
    grow(whole, values, [], threads)
    grow(broken, values[:, :45], [10], threads)
    again = GrowingArray(broken, "token", 45, threads)
    # Nothing new, nothing written.
    again.flush()
    assert not again.written
    again.append(values[:, 45:])
    again.flush()
    again.settle()
    again.wait()
    for file in (whole / "c").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (broken / file.relative_to(whole)).read_bytes()


@pytest.mark.usefixtures("small_layout")
def test_growing__zarr_python_encodes_to_the_same_size(tmp_path: Path, threads: Threads) -> None:
    values = np.random.default_rng(2).standard_normal((LAYERS, 32, WIDTH)).astype(np.float32)
    ours, theirs = create(tmp_path / "ours"), create(tmp_path / "theirs")
    grow(ours, values, [], threads)
    array = zarr.open_array(str(theirs), mode="r+")
    array.resize(values.shape)
    array[...] = values
    sizes = [
        {file.relative_to(each): file.stat().st_size for file in (each / "c").rglob("*") if file.is_file()}
        for each in (ours, theirs)
    ]
    assert len(sizes[0]) == 2
    assert sizes[0] == sizes[1]


def test_growing__every_bit_of_a_number_comes_back(tmp_path: Path, threads: Threads) -> None:
    values = np.zeros((LAYERS, 3, WIDTH), np.float32)
    # NaN with another payload than the fill value's, and minus zero.
    values.view(np.uint32)[...] = 0x7FC00123
    values[1] = -0.0
    path = create(tmp_path / "run")
    grow(path, values, [1], threads)
    held = np.asarray(zarr.open_array(str(path), mode="r")[...])
    np.testing.assert_array_equal(held.view(np.uint32), values.view(np.uint32))


def test_chunk_codec__refuses_what_another_writer_chose() -> None:
    with pytest.raises(FormatError, match="encoded with bytes, gzip, which this writer does not do"):
        ChunkCodec([{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}], 0)


@pytest.mark.parametrize("size", [0, 1, 4096, STAGE_BYTES - 1, STAGE_BYTES, 2 * STAGE_BYTES + 12345])
def test_write_file__size_and_checksum(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(3).integers(0, 255, size, dtype=np.uint8).tobytes()
    pieces = [data[: size // 3], b"", data[size // 3 :]]
    assert write_file(tmp_path / "c" / "0", pieces) == (size, zlib.crc32(data))
    assert (tmp_path / "c" / "0").read_bytes() == data


def test_write_file__goes_through_the_cache_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.write, []

    def write(handle: int, block: Any) -> int:
        if len(block) == STAGE_BYTES and not refused:
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, block)

    monkeypatch.setattr("mechanistic.store.chunk_file.os.write", write)
    monkeypatch.setattr("mechanistic.store.chunk_file._direct", lambda handle, *, on: not on)
    data = bytes(range(256)) * (STAGE_BYTES // 128)
    write_file(tmp_path / "0", [data])
    assert refused
    assert (tmp_path / "0").read_bytes() == data


def test_write_file__leaves_the_old_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").write_bytes(b"old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mechanistic.store.chunk_file.os.write", full)
    for name in ("0", "1"):
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / name, [b"new"])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"0": b"old"}
