"""Arrays decoded straight from their files: what zarr-python reads, and nothing believed that a file says."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import small_run
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, Zstd
from xarray.core.indexing import BasicIndexer

from mechanistic.store import RunWriter, open_run
from mechanistic.store.errors import CorruptError
from mechanistic.store.stored_array import StoredArray

SITE = "text/resid_post/resid_post"
CHUNK, CHUNKS = 256, 3 * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 512 rows, chunks of 256; layer 1 and the fifth shard hold nothing but fill values."""
    path = tmp_path_factory.mktemp("stored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechanistic.store.layout.CHUNK_BYTES", CHUNK * small_run.WIDTH * 4)
        patch.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
        patch.setattr("mechanistic.store.layout.SHARD_ROWS_MIN", 2 * CHUNK)
        with RunWriter.create(path, small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
            for sample in range(12):
                rows = small_run.rows(sample)
                rows["text/resid_post"]["resid_post"][slice(None) if sample in (4, 5, 6) else 1] = np.nan
                writer.append(rows, samples=1)
            writer.finish()
    names = {file.parent.name for file in (path / SITE / "c/0").rglob("0")}
    assert names == {str(number) for number in range(10)} - {"4"}
    return path


@pytest.fixture(scope="module")
def whole(run: Path) -> np.ndarray[Any, Any]:
    return np.asarray(zarr.open_array(str(run / SITE), mode="r")[...])


def stored(run: Path, name: str = SITE) -> StoredArray | None:
    return StoredArray.of(run / name, json.loads((run / name / "zarr.json").read_text()))


def read(array: StoredArray | None, *key: int | slice) -> np.ndarray[Any, Any]:
    assert array is not None
    return np.asarray(array[BasicIndexer(key)])


@st.composite
def keys(draw: st.DrawFn) -> tuple[int | slice, ...]:
    """What xarray asks of an array: numbers, and slices that go forward."""
    parts = []
    for size in (small_run.LAYERS, sum(map(small_run.token_count, range(12))), small_run.WIDTH):
        start, length, step = (
            draw(st.integers(0, size)),
            draw(st.integers(0, size)),
            draw(st.integers(1, 300)),
        )
        parts.append(draw(st.just(slice(start, start + length, step)) | st.integers(0, size - 1)))
    return tuple(parts)


@settings(max_examples=60, deadline=None)
@given(key=keys())
def test_stored_array__reads_what_zarr_reads(
    run: Path, whole: np.ndarray[Any, Any], key: tuple[int | slice, ...]
) -> None:
    np.testing.assert_array_equal(read(stored(run), *key), whole[key], strict=True)


@pytest.mark.parametrize("name", ["tokens/text/token_text", "samples/options"])
def test_stored_array__reads_the_texts_that_zarr_reads(run: Path, name: str) -> None:
    expected = zarr.open_array(str(run / name), mode="r")[...]
    rest = (slice(None),) * (expected.ndim - 1)
    for rows in (slice(None), slice(3, 9, 2), slice(0, 0), 5):
        found = read(stored(run, name), rows, *rest)
        np.testing.assert_array_equal(found, expected[(rows, ...)], strict=True)


@pytest.mark.parametrize("plain", [b"\x05\0\0\0", b"\0\0\1\0\xff\xff\xff\xff", b""])
def test_stored_array__damaged_texts_are_an_error(run: Path, tmp_path: Path, plain: bytes) -> None:
    name = "samples/sample_id"
    shutil.copytree(run / name, tmp_path / name)
    (tmp_path / name / "c/0").write_bytes(signed(Zstd().encode(plain)))
    with pytest.raises(CorruptError, match="c/0 is damaged: the chunk at byte 0 does not hold 65536 texts"):
        read(stored(tmp_path, name), slice(0, 2))


def test_open_run__decodes_what_was_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    decode = StoredArray._read

    def record(self: StoredArray, key: Any) -> Any:
        seen.add(self.folder.relative_to(run).as_posix())
        return decode(self, key)

    monkeypatch.setattr(StoredArray, "_read", record)
    ours, plain = open_run(run), xr.open_datatree(run, engine="zarr")
    assert not seen, "opening reads no chunk"
    for group in (
        "samples",
        "images",
        "image_bytes",
        "tokens/text",
        "text/resid_post",
        "text/resid_post_last",
    ):
        xr.testing.assert_identical(ours[group].to_dataset().compute(), plain[group].to_dataset().compute())
    assert {SITE, "tokens/text/is_last_prompt", "image_bytes/data", "samples/correct"} <= seen
    assert {"tokens/text/token_text", "samples/sample_id"} <= seen


def test_stored_array__is_for_what_the_writer_writes_only(run: Path) -> None:
    metadata = json.loads((run / SITE / "zarr.json").read_text())
    shard = metadata["codecs"][0]
    inner = shard["configuration"]["codecs"]

    def sharded(**changes: Any) -> dict[str, Any]:
        return {"codecs": [{**shard, "configuration": {**shard["configuration"], **changes}}]}

    others: list[dict[str, Any]] = [
        sharded(index_location="start"),
        sharded(codecs=inner[:2]),
        sharded(codecs=[{"name": "transpose", "configuration": {"order": [0, 2, 1]}}, *inner]),
        sharded(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, *inner[1:]]),
        sharded(codecs=[inner[0], {"name": "zstd", "configuration": {}}, inner[2]]),
        {"codecs": [shard, {"name": "gzip", "configuration": {"level": 1}}]},
        {"data_type": "float64"},
        {"fill_value": 0.0},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
    ]
    assert StoredArray.of(run, metadata) is not None
    for change in others:
        assert StoredArray.of(run, metadata | change) is None, change
    text = json.loads((run / "tokens/text/token_text/zarr.json").read_text())
    assert StoredArray.of(run, text | {"codecs": [inner[0], *text["codecs"][1:]]}) is None


def test_stored_array__travels_to_other_processes(run: Path) -> None:
    array = stored(run)
    copy = pickle.loads(pickle.dumps(array))  # noqa: S301
    np.testing.assert_array_equal(
        read(copy, 2, slice(700, 800), slice(None)), read(array, 2, slice(700, 800), slice(None))
    )


def shard_with(run: Path, copy: Path, change: Any) -> StoredArray | None:
    """The site in a copy, whose first shard `change` made another of: bytes and index in, bytes out."""
    shutil.copytree(run / SITE, copy / SITE)
    file = copy / SITE / "c/0/0/0"
    whole = file.read_bytes()
    end = len(whole) - 16 * CHUNKS - 4
    index = np.frombuffer(whole[end:-4], "<u8").reshape(CHUNKS, 2).copy()
    file.write_bytes(change(bytearray(whole[:end]), index))
    return stored(copy)


def with_index(data: bytes, index: np.ndarray[Any, Any]) -> bytes:
    return data + signed(index.astype("<u8").tobytes())


def signed(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def flipped(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    data[1000] ^= 1
    return with_index(data, index)


def flipped_index(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    whole = bytearray(with_index(data, index))
    whole[-10] ^= 1
    return whole


def outside(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    index[0] = 1 << 40, 100
    return with_index(data, index)


def wrapping_around(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    index[0] = (1 << 64) - 50, 100
    return with_index(data, index)


def into_the_index(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    index[0] = len(data) - 10, 20
    return with_index(data, index)


def too_short(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    index[0] = 0, 3
    return with_index(data, index)


def of_another_size(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    other = signed(Blosc(cname="zstd").encode(np.zeros(5, np.float32)))
    index[0] = len(data), len(other)
    return with_index(data + other, index)


def claiming_gigabytes(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    other = bytearray(Blosc(cname="zstd").encode(np.zeros(CHUNK * small_run.WIDTH, np.float32)))
    other[4:8] = (2**31 - 1).to_bytes(4, "little")
    other = bytearray(signed(bytes(other)))
    index[0] = len(data), len(other)
    return with_index(data + other, index)


def no_blosc(data: bytearray, index: np.ndarray[Any, Any]) -> bytes:
    other = signed(b"no blosc")
    index[0] = len(data), len(other)
    return with_index(data + other, index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped, "checksum of its bytes 0 to"),
        (flipped_index, "checksum of its bytes"),
        (lambda data, index: with_index(data, index)[:-1], "checksum of its bytes"),
        (lambda data, index: b"", "it has 0 bytes"),
        (outside, "and more belong to it"),
        (wrapping_around, "and more belong to it"),
        (into_the_index, "and more belong to it"),
        (too_short, "and more belong to it"),
        (of_another_size, "does not hold 8192 bytes"),
        (claiming_gigabytes, "does not hold 8192 bytes"),
        (no_blosc, "does not hold 8192 bytes"),
    ],
)
def test_stored_array__damage_is_an_error(run: Path, tmp_path: Path, change: Any, message: str) -> None:
    array = shard_with(run, tmp_path, change)
    with pytest.raises(CorruptError, match=rf"c/0/0/0 is damaged: .*{message}.*\n.*mechanistic verify"):
        read(array, 0, slice(0, 10), slice(None))
    np.testing.assert_array_equal(
        read(array, 0, slice(512, 520), slice(None)), read(stored(run), 0, slice(512, 520), slice(None))
    )


def test_open_run__damage_in_a_table_is_an_error(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "samples/correct/c/0"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptError, match="samples/correct/c/0 is damaged: the checksum"):
        open_run(copy)["samples"]["correct"].compute()
