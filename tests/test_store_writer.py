"""The writer: what is committed is permanent, what is not is gone, and equal rows give equal files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import xarray as xr
import zarr

from mechanistic.store import ArraySchema, GroupSchema, RunWriter, open_run, read_manifest
from mechanistic.store.errors import DiskFullError, OutputExistsError, StoreError
from mechanistic.store.info import human_bytes
from mechanistic.store.layout import layout
from mechanistic.store.lock import take_lock
from mechanistic.store.manifest import sync


def contents(path: Path) -> dict[str, bytes]:
    """Every chunk file of a run."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in path.rglob("*")
        if "c" in p.parts and p.is_file()
    }


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 512 rows, so that a small run has several, and samples are cut by them."""
    monkeypatch.setattr("mechanistic.store.layout.CHUNK_BYTES", 256 * small_run.WIDTH * 4)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_ROWS_MIN", 512)
    monkeypatch.setattr("mechanistic.store.layout.TABLE_ROWS", 700)


def test_writer__stores_exactly_what_was_appended(tmp_path: Path) -> None:
    run = open_run(small_run.write_run(tmp_path / "run"))
    expected = np.concatenate([small_run.rows(s)["text/resid_post"]["resid_post"] for s in range(12)], axis=1)
    np.testing.assert_array_equal(run["text/resid_post"]["resid_post"].values, expected)
    texts = np.concatenate([small_run.rows(s)["tokens/text"]["token_text"] for s in range(12)])
    assert run["text/resid_post"]["token_text"].values.tolist() == texts.tolist()
    assert run["samples"]["sample_id"].values.tolist() == [f"s{s}" for s in range(12)]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("died_after", [0, 1, 4, 7, 11])
def test_writer__resumed_run_has_the_same_bytes(tmp_path: Path, died_after: int) -> None:
    whole = small_run.write_run(tmp_path / "whole", commit_every=3)
    writer = RunWriter.create(tmp_path / "broken", small_run.ATTRIBUTES, small_run.groups(), samples=12)
    for sample in range(died_after):
        writer.append(small_run.rows(sample), samples=1)
        if (sample + 1) % 3 == 0:
            writer.commit()
    writer.close()
    writer = RunWriter.resume(tmp_path / "broken", small_run.ATTRIBUTES)
    assert writer.samples == died_after // 3 * 3
    with writer:
        for sample in range(writer.samples, 12):
            writer.append(small_run.rows(sample), samples=1)
        writer.finish()
    assert contents(tmp_path / "broken") == contents(whole)
    assert read_manifest(whole).content_sha256() == read_manifest(tmp_path / "broken").content_sha256()
    assert len(contents(whole)) > 60


WRITE_AND_DIE = """
import os, sys, small_run
from pathlib import Path
from mechanistic.store import RunWriter
path = Path(sys.argv[1])
writer = RunWriter.resume(path, small_run.ATTRIBUTES) if path.exists() else RunWriter.create(
    path, small_run.ATTRIBUTES, small_run.groups(), samples=12)
for sample in range(writer.samples, 12):
    writer.append(small_run.rows(sample), samples=1)
    if sample == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    writer.commit()
writer.finish()
"""


def test_writer__survives_sigkill(tmp_path: Path) -> None:
    for dies_at in (0, 2, 7, 99):
        process = subprocess.run(
            [sys.executable, "-c", WRITE_AND_DIE, str(tmp_path / "run"), str(dies_at)],
            cwd=Path(small_run.__file__).parent,
            capture_output=True,
            text=True,
        )
        assert process.returncode == (0 if dies_at == 99 else -9), process.stderr
    whole = small_run.write_run(tmp_path / "whole")
    assert read_manifest(whole).content_sha256() == read_manifest(tmp_path / "run").content_sha256()


def test_writer__resume_refuses_other_settings(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12).close()
    other = {**small_run.ATTRIBUTES, "model": {"name": "made-up", "dtype": "bfloat16"}}
    with pytest.raises(OutputExistsError, match=r"model\.dtype is 'float32', not 'bfloat16'"):
        RunWriter.resume(tmp_path / "run", other)


def test_writer__second_writer_is_refused(tmp_path: Path) -> None:
    with (
        RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12),
        pytest.raises(OutputExistsError, match=rf"another process is writing .*\(process {os.getpid()} on "),
    ):
        RunWriter.resume(tmp_path / "run", small_run.ATTRIBUTES)


DIE_IN_CREATION = """
import os, sys, small_run
from mechanistic.store import RunWriter, draft
draft.sync_all = lambda folder: os.kill(os.getpid(), 9)
RunWriter.create(sys.argv[1], small_run.ATTRIBUTES, small_run.groups(), samples=1)
"""


@pytest.mark.parametrize("again", ["create", "resume"])
def test_writer__removes_the_drafts_of_dead_writers_alone(tmp_path: Path, again: str) -> None:
    run = tmp_path / "run"
    if again == "resume":
        RunWriter.create(run, small_run.ATTRIBUTES, small_run.groups(), samples=1).close()
    died = subprocess.run(
        [sys.executable, "-c", DIE_IN_CREATION, str(tmp_path / "other")],
        cwd=Path(small_run.__file__).parent,
        check=False,
    )
    assert died.returncode == -9
    (draft,) = tmp_path.glob("other.*.partial")
    draft.rename(tmp_path / "run.0123abcd.partial")
    (tmp_path / "run.12340000.partial").mkdir()
    kept = [
        tmp_path / name for name in ("run.99990000.partial", "run.mine.partial", "other.12340000.partial")
    ]
    for folder in kept:
        folder.mkdir()
    with take_lock(kept[0]):
        if again == "resume":
            RunWriter.resume(run, small_run.ATTRIBUTES).close()
        else:
            RunWriter.create(run, small_run.ATTRIBUTES, small_run.groups(), samples=1).close()
    assert sorted(tmp_path.glob("*.partial")) == sorted(kept)


def test_writer__a_draft_taken_for_a_dead_one_is_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(folder: Path) -> None:
        folder.rmdir()
        raise FileNotFoundError(folder)

    monkeypatch.setattr("mechanistic.store.draft.take_lock", taken)
    with pytest.raises(OutputExistsError, match=r"another process is writing .*run\."):
        RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=1)
    assert list(tmp_path.iterdir()) == []


def test_writer__create_refuses_an_occupied_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="already exists"):
        RunWriter.create(tmp_path, small_run.ATTRIBUTES, small_run.groups(), samples=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_writer__what_a_new_run_is_made_of_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()

    def noted(path: Path) -> None:
        assert not (tmp_path / "run").exists()
        synced.add(path.relative_to(tmp_path).as_posix().partition("/")[2])
        sync(path)

    monkeypatch.setattr("mechanistic.store.draft.sync", noted)
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=1):
        held = {node.relative_to(tmp_path / "run").as_posix() for node in (tmp_path / "run").rglob("*")}
        assert {name for name in held if name.endswith("zarr.json")}
        assert held <= synced


def test_writer__never_casts(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
        rows = small_run.rows(0)
        rows["text/resid_post"]["resid_post"] = rows["text/resid_post"]["resid_post"].astype(np.float64)
        with pytest.raises(StoreError, match=r"resid_post takes float32 .* these rows are float64"):
            writer.append(rows, samples=1)


def test_writer__takes_layers_one_by_one(tmp_path: Path) -> None:
    for name in ("whole", "layers"):
        with RunWriter.create(tmp_path / name, small_run.ATTRIBUTES, small_run.groups(), samples=2) as writer:
            for sample in range(2):
                rows: dict[str, Any] = small_run.rows(sample)
                if name == "layers":
                    values = rows["text/resid_post"]["resid_post"]
                    rows["text/resid_post"]["resid_post"] = [layer.copy() for layer in values]
                writer.append(rows, samples=1)
            writer.finish()
    hashes = {read_manifest(tmp_path / name).content_sha256() for name in ("whole", "layers")}
    assert len(hashes) == 1


@pytest.mark.parametrize("odd", ["layers", "rows", "dtype"])
def test_writer__refuses_layers_that_do_not_match(tmp_path: Path, odd: str) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
        rows: dict[str, Any] = small_run.rows(0)
        layers = list(rows["text/resid_post"]["resid_post"])
        other = {"layers": [], "rows": [layers[-1][:-1]], "dtype": [layers[-1].astype(np.float16)]}
        rows["text/resid_post"]["resid_post"] = layers[:-1] + other[odd]
        with pytest.raises(StoreError, match="resid_post takes float32"):
            writer.append(rows, samples=1)


def test_writer__refuses_columns_of_unequal_length(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
        rows = small_run.rows(0)
        rows["tokens/text"]["position"] = rows["tokens/text"]["position"][:-1]
        with pytest.raises(StoreError, match=r"do not fit its arrays: .*'position': "):
            writer.append(rows, samples=1)


def test_writer__refuses_a_missing_column(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
        rows = small_run.rows(0)
        del rows["tokens/text"]["position"]
        with pytest.raises(StoreError, match="do not fit its arrays: \\['position'\\]"):
            writer.append(rows, samples=1)


def test_writer__finish_needs_every_sample(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12) as writer:
        writer.append(small_run.rows(0), samples=1)
        with pytest.raises(StoreError, match="1 of 12 samples"):
            writer.finish()


def test_writer__full_disk_keeps_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12)
    writer.append(small_run.rows(0), samples=1)
    writer.commit()
    writer.append(small_run.rows(1), samples=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mechanistic.store.manifest.os.fsync", full)
    with pytest.raises(DiskFullError, match=r"committed so far is intact. The 11 samples .* that are there"):
        writer.commit()
    monkeypatch.undo()
    writer.close()
    run = open_run(tmp_path / "run", allow_partial=True)
    expected = small_run.rows(0)["text/resid_post"]["resid_post"]
    np.testing.assert_array_equal(run["text/resid_post"]["resid_post"].values, expected)


def test_writer__full_disk_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12)
    rows = small_run.rows(0)
    writer.append(rows, samples=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    held = human_bytes(sum(values.nbytes for columns in rows.values() for values in columns.values()))
    with monkeypatch.context() as patched:
        patched.setattr("mechanistic.store.manifest.os.fsync", full)
        with pytest.raises(DiskFullError, match=rf"12 samples .* by the {held} that the first 1 are before"):
            writer.commit()
    writer.close()


def test_writer__static_group_opens_with_labels(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=1) as writer:
        unembed = np.arange(16, dtype=np.float32).reshape(2, 8)
        readout = xr.Dataset(
            {"unembed": (("word", "d_model"), unembed)}, coords={"word": np.array(["left", "right"], object)}
        )
        writer.put_static("readout", readout, {"eps": 1e-5})
        writer.append(small_run.rows(0), samples=1)
        writer.finish()
    stored = open_run(tmp_path / "run")["readout"]
    np.testing.assert_array_equal(stored["unembed"].sel(word="right").values, unembed[1])
    assert stored.attrs["eps"] == 1e-5


def test_layout__follows_the_format() -> None:
    wide = ArraySchema("resid_post", ("layer", "token", "d_model"), "float16", {"layer": 36, "d_model": 2560})
    plan = layout(wide, "token")
    chunk_bytes, shard_bytes = np.prod(plan.chunk) * 2, np.prod(plan.shard) * 2
    assert plan.chunk[0] == 1
    assert 1 << 19 <= chunk_bytes <= 1 << 20
    assert 64 << 20 <= shard_bytes <= 128 << 20
    assert plan.shard[1] >= 2048
    assert plan.shard[1] % plan.chunk[1] == 0


def test_schema__unknown_dtype_is_an_error() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        ArraySchema("x", ("token",), "bfloat16")
    with pytest.raises(ValueError, match="growing dimension"):
        GroupSchema("g", "token", (ArraySchema("x", ("sample",), "float32"),))


@pytest.mark.usefixtures("small_shards")
def test_store__is_plain_zarr_v3(tmp_path: Path) -> None:
    path = small_run.write_run(tmp_path / "run")
    array = zarr.open_array(str(path / "text/resid_post/resid_post"), mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shards == (small_run.LAYERS, 512, small_run.WIDTH)
    codecs = json.loads((path / "text/resid_post/resid_post/zarr.json").read_text())["codecs"]
    inner = [c["name"] for c in codecs[0]["configuration"]["codecs"]]
    assert inner == ["bytes", "blosc", "crc32c"]
