"""verify names what is damaged and whose data it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import small_run
import zarr

from mechanistic.store import ArraySchema, GroupSchema, RunWriter
from mechanistic.store.errors import FormatError, UsageError
from mechanistic.store.schema import token_columns
from mechanistic.store.verify import verify_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run.write_run(tmp_path / "run")


def test_verify__sound_run(run: Path) -> None:
    assert verify_run(run) == []


def test_verify__flipped_bit_names_array_and_samples(run: Path) -> None:
    file = run / "text/resid_post/resid_post/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    problems = verify_run(run)
    assert [p.path for p in problems] == ["text/resid_post/resid_post/c/0/0/0"]
    assert "checksum differs" in problems[0].what
    assert problems[0].samples == tuple(range(12))


def test_verify__flipped_bit_is_an_error_when_read_too(run: Path) -> None:
    file = run / "text/resid_post/resid_post/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(run / "text/resid_post/resid_post"), mode="r")[...]


def test_verify__truncated_and_missing_files(run: Path) -> None:
    shard = run / "text/resid_post/resid_post/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-100])
    (run / "samples/sample_id/c/0").unlink()
    found = {p.path: p.what for p in verify_run(run)}
    assert found["samples/sample_id/c/0"] == "missing"
    assert "bytes, not" in found["text/resid_post/resid_post/c/0/0/0"]


def test_verify__labels_out_of_range(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=1)
    rows = small_run.rows(0)
    rows["tokens/text"]["sample_index"][0] = 9
    rows["tokens/text"]["kind"] = np.full_like(rows["tokens/text"]["kind"], 77)
    writer.append(rows, samples=1)
    writer.finish()
    found = [str(p) for p in verify_run(tmp_path / "run")]
    assert any("tokens/text/sample_index: points outside samples/" in text for text in found)
    assert any("tokens/text/sample_index: is not in order" in text for text in found)
    assert any("tokens/text/kind: holds [77]" in text for text in found)


def test_verify__missing_column_and_wrong_hash(run: Path) -> None:
    root = zarr.open_group(str(run), mode="r+", use_consolidated=False)
    root.attrs["completeness"] = {**root.attrs["completeness"], "content_sha256": "0"}
    shutil.rmtree(run / "tokens/text/position")
    found = {p.path for p in verify_run(run)}
    assert "manifest.json" in found


def test_verify__not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        verify_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="not a mechanistic run"):
        verify_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("start", "length", "found"),
    [
        ([0, 2, 5], [2, 3, 1], []),
        ([0, 3, 5], [2, 3, 1], ["start: row 1 starts at entry 3, where the rows before it end at 2"]),
        ([0, 1, 4], [2, 3, 1], ["start: row 1 starts at entry 1, where the rows before it end at 2"]),
        ([1, 3, 6], [2, 3, 1], ["start: row 0 starts at entry 1, where the rows before it end at 0"]),
        ([0, 2, 5], [2, 3, 2], ["length: rows of 7 entries in all, for 6 in the pattern"]),
        ([0, 2, 2], [2, 0, 4], ["length: row 1 has 0 entries"]),
    ],
)
def test_verify__attention_rows_stand_end_to_end(
    tmp_path: Path, start: list[int], length: list[int], found: list[str]
) -> None:
    places = [ArraySchema("start", ("token",), "int64", attrs={"points_into": "text/pattern"})]
    places += [ArraySchema("length", ("token",), "int64"), ArraySchema("key_start", ("token",), "int32")]
    labels = token_columns("token")
    weights = ArraySchema("pattern", ("layer", "entry", "head"), "float32", {"layer": 2, "head": 1})
    groups = [
        *small_run.groups(),
        GroupSchema("text/pattern", "entry", (weights,), {}, {"layer": np.arange(2, dtype=np.int32)}),
        GroupSchema("text/pattern_rows", "token", (*places, *labels), {}),
    ]
    rows = small_run.rows(0)
    tokens = {name: rows["tokens/text"][name][:3] for name in (column.name for column in labels)}
    rows["text/pattern"] = {"pattern": np.ones((2, 6, 1), np.float32)}
    rows["text/pattern_rows"] = {
        **tokens,
        "start": np.array(start),
        "length": np.array(length),
        "key_start": np.zeros(3, np.int32),
    }
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, groups, samples=1) as writer:
        writer.append(rows, samples=1)
        writer.finish()
    told = [str(problem) for problem in verify_run(tmp_path / "run")]
    assert len(told) == len(found)
    for text, expected in zip(told, found, strict=True):
        assert text.startswith(f"text/pattern_rows/{expected}")
