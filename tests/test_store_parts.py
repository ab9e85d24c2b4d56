"""A run of several parts reads as one, and merges into the store that one writer would have written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_run
import xarray as xr

from mechanistic.store import RunWriter, open_run, read_manifest
from mechanistic.store.errors import DiskFullError, IncompleteRunError, OutputExistsError
from mechanistic.store.info import format_info, run_info
from mechanistic.store.lock import take_lock
from mechanistic.store.merge import merge_run
from mechanistic.store.parts import part_path, part_span
from mechanistic.store.root import open_root
from mechanistic.store.verify import verify_run

COUNT = 12
PARTS = 3
ATTRIBUTES: dict[str, Any] = {
    **small_run.ATTRIBUTES,
    "dataset": {"name": "made-up", "hash": "0", "num_samples": COUNT},
}


def write_part(run: Path, index: int, *, until: int | None = None) -> None:
    """One part as a capture job writes it: its own rows are counted from 0."""
    open_root(run, ATTRIBUTES, parts=PARTS)
    span = part_span(COUNT, index, PARTS)
    bytes_before = sum(len(f"image {s}") for s in range(span.start))
    with RunWriter.create(part_path(run, index), ATTRIBUTES, small_run.groups(), samples=len(span)) as writer:
        for sample in span[:until]:
            rows = small_run.rows(sample)
            for columns in rows.values():
                if "sample_index" in columns:
                    columns["sample_index"] = columns["sample_index"] * 0 + np.int32(sample - span.start)
            # `rows` says where a sample's image is in a run that begins with sample 0.
            rows["images"]["start"] = rows["images"]["start"] - bytes_before
            rows["images"]["sample_index"] = np.array([sample - span.start], np.int32)
            writer.append(rows, samples=1)
        if until is None:
            writer.finish()
        else:
            writer.commit()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_run(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("several") / "run"
    for index in (2, 0, 1):
        write_part(run, index)
    return run


@pytest.fixture
def parts(several: Path, tmp_path: Path) -> Path:
    shutil.copytree(several, tmp_path / "parts-run")
    return tmp_path / "parts-run"


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = open_run(one), open_run(other)
    assert set(mine.groups) == set(theirs.groups)
    for group in mine.groups:
        if group != "/":
            xr.testing.assert_identical(mine[group].to_dataset(), theirs[group].to_dataset())


def test_open_run__reads_parts_end_to_end(one: Path, parts: Path) -> None:
    assert_same(one, parts)
    assert open_run(parts).attrs["parts"] == PARTS
    values = open_run(parts)["text/resid_post"]["resid_post"]
    assert values.chunks is not None
    assert verify_run(parts) == []


def test_open_run__names_parts_that_never_ran_or_are_unfinished(tmp_path: Path) -> None:
    write_part(tmp_path / "run", 0)
    write_part(tmp_path / "run", 2, until=1)
    with pytest.raises(IncompleteRunError, match=r"part 1 never ran; part 2 has 1 of 4 samples"):
        open_run(tmp_path / "run")
    held = open_run(tmp_path / "run", allow_partial=True)
    assert held["samples"]["sample_id"].values.tolist() == ["s0", "s1", "s2", "s3", "s8"]
    assert held["text/resid_post"]["sample_index"].values[-1] == 4
    info = run_info(tmp_path / "run")
    assert (info["samples"], info["samples_expected"], info["state"]) == (5, COUNT, "writing")
    assert "part 1 never ran" in format_info(info)
    with take_lock(Path(part_path(tmp_path / "run", 0))):
        assert f"writer   part 0: process {os.getpid()} on " in format_info(run_info(tmp_path / "run"))
    assert [str(p) for p in verify_run(tmp_path / "run")] == ["parts/0001: this part never ran"]
    with pytest.raises(IncompleteRunError, match="part 1 never ran"):
        merge_run(tmp_path / "run")


def test_merge__equals_the_run_of_one_writer(one: Path, parts: Path) -> None:
    assert merge_run(parts) == parts
    assert read_manifest(parts).content_sha256() == read_manifest(one).content_sha256()
    assert_same(one, parts)
    assert verify_run(parts) == []
    assert not (parts / "parts").exists()
    before = (parts / "manifest.json").read_bytes()
    assert merge_run(parts) == parts
    assert (parts / "manifest.json").read_bytes() == before


def test_merge__into_another_folder_keeps_the_parts(one: Path, parts: Path, tmp_path: Path) -> None:
    for _ in range(2):
        merge_run(parts, tmp_path / "plain")
    assert_same(one, tmp_path / "plain")
    assert_same(one, parts)
    with pytest.raises(OutputExistsError, match="another run"):
        merge_run(parts, one)


class Killed(BaseException):
    """What a kill does."""


@pytest.mark.parametrize("steps", [0, 2, 6, 10])
def test_merge__continues_wherever_it_was_killed(
    one: Path, parts: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    left = [steps]

    def mortal(function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return step

    monkeypatch.setattr("mechanistic.store.merge.COMMIT_BYTES", 0)
    monkeypatch.setattr("mechanistic.store.part_reader.BLOCK_BYTES", 1)
    with monkeypatch.context() as dying:
        dying.setattr(RunWriter, "commit", mortal(RunWriter.commit))
        dying.setattr(Path, "rename", mortal(Path.rename))
        dying.setattr("mechanistic.store.merge.replace_file", mortal(lambda p, d: p.write_bytes(d)))
        with pytest.raises(Killed):
            merge_run(parts)
    merge_run(parts)
    assert read_manifest(parts).content_sha256() == read_manifest(one).content_sha256()
    assert_same(one, parts)


def test_merge__refuses_a_full_disk_before_it_writes(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechanistic.store.merge.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DiskFullError, match="10 B are free"):
        merge_run(parts)


def test_root__removes_what_a_job_left_that_was_killed_there(parts: Path) -> None:
    (parts / "zarr.json.0123abcd.partial").write_text("{")
    open_root(parts, ATTRIBUTES, parts=PARTS)
    assert list(parts.glob("*.partial")) == []


def test_root__refuses_other_settings(parts: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"parts is 3, not 4"):
        open_root(parts, ATTRIBUTES, parts=4)
    other = {**ATTRIBUTES, "model": {"name": "other", "dtype": "float32"}}
    with pytest.raises(OutputExistsError, match=r"model\.name is 'made-up', not 'other'"):
        open_root(parts, other, parts=PARTS)
