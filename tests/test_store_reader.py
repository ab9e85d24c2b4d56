"""The reader: lazy, labelled, and plain xarray reads the same."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import small_run
import xarray as xr

from mechanistic.store import RunWriter, open_run, site, sites
from mechanistic.store.errors import FormatError, IncompleteRunError, MissingSiteError, UsageError
from mechanistic.store.info import format_info, run_info


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_run(tmp_path_factory.mktemp("store") / "run")


def test_open_run__is_lazy(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "run"))
    for chunks in [p for p in copy.rglob("c") if p.is_dir() and "layer" not in p.parts]:
        shutil.rmtree(chunks)
    data = open_run(copy)["text/resid_post"]["resid_post"]
    assert isinstance(data.data, da.Array)
    assert data.shape == (small_run.LAYERS, sum(map(small_run.token_count, range(12))), small_run.WIDTH)
    assert data.data.chunksize[0] == 1


def test_open_run__dask_blocks_are_layer_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechanistic.store.layout.CHUNK_BYTES", 256 * small_run.WIDTH * 4)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
    monkeypatch.setattr("mechanistic.store.layout.SHARD_ROWS_MIN", 512)
    data = open_run(small_run.write_run(tmp_path / "run"))["text/resid_post"]["resid_post"].data
    assert data.chunks[0] == (1,) * small_run.LAYERS
    assert set(data.chunks[1][:-1]) == {512}


def test_open_run__labels_are_coordinates(path: Path) -> None:
    data = open_run(path)["text/resid_post"]
    assert list(data.data_vars) == ["resid_post"]
    assert {"sample_index", "position", "kind", "token_text", "is_last_prompt", "layer"} <= set(data.coords)
    assert data["kind"].attrs["flag_meanings"] == "text image special answer"


def test_open_datatree__plain_xarray_reads_the_same_numbers(path: Path) -> None:
    ours, plain = open_run(path), xr.open_datatree(path, engine="zarr")
    for group in ("samples", "images", "tokens/text", "text/resid_post", "text/resid_post_last"):
        xr.testing.assert_identical(ours[group].to_dataset().compute(), plain[group].to_dataset().compute())


def test_open_run__over_http(path: Path) -> None:
    handler = functools.partial(QuietHandler, directory=str(path.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/run"
        remote = open_run(url)
        local = open_run(path)
        xr.testing.assert_identical(
            remote["samples"].to_dataset().compute(), local["samples"].to_dataset().compute()
        )
        with pytest.raises(UsageError, match="there is no run at"):
            open_run(f"http://127.0.0.1:{server.server_port}/nothing")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_open_run__unfinished_needs_consent_and_is_cut(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", small_run.ATTRIBUTES, small_run.groups(), samples=12)
    writer.append(small_run.rows(0), samples=1)
    writer.commit()
    writer.append(small_run.rows(1), samples=1)
    with pytest.raises(IncompleteRunError, match="1 of 12 samples"):
        open_run(tmp_path / "run")
    run = open_run(tmp_path / "run", allow_partial=True)
    assert run["samples"].sizes["sample"] == 1
    assert run["text/resid_post"].sizes["token"] == small_run.token_count(0)
    assert "UNFINISHED" in format_info(run_info(tmp_path / "run"))
    assert f"writer   process {os.getpid()} on " in format_info(run_info(tmp_path / "run"))
    writer.close()
    assert "nobody is writing; the same capture command" in format_info(run_info(tmp_path / "run"))


@pytest.mark.parametrize(
    ("version", "message"), [("0.99", "Upgrade"), ("1.0", "Upgrade"), ("seven", "must look like")]
)
def test_open_run__other_version(path: Path, tmp_path: Path, version: str, message: str) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "run"))
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["format_version"] = version
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatError, match=message):
        open_run(copy)


def test_open_run__foreign_and_damaged_stores(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        open_run(tmp_path / "nothing")
    xr.Dataset({"x": ("a", np.arange(3))}).to_zarr(tmp_path / "foreign.zarr", consolidated=False)
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        open_run(tmp_path / "foreign.zarr")
    copy = Path(shutil.copytree(path, tmp_path / "run"))
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(FormatError, match="is not a manifest"):
        open_run(copy)
    (copy / "manifest.json").write_text(text)
    root = json.loads((copy / "zarr.json").read_text())
    array = root["consolidated_metadata"]["metadata"]["text/resid_post/resid_post"]
    array["codecs"] = ["no codec", *array["codecs"]]
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatError, match="cannot be read as a Zarr store"):
        open_run(copy)
    (copy / "zarr.json").unlink()
    with pytest.raises(FormatError, match="cannot be read as a Zarr store"):
        open_run(copy)


def test_site__missing_one_says_what_there_is(path: Path) -> None:
    run = open_run(path)
    assert sites(run) == ["text/resid_post", "text/resid_post_last"]
    assert site(run, "text.resid_post").sizes["layer"] == small_run.LAYERS
    with pytest.raises(MissingSiteError, match=r"no 'text/q'; it holds text/resid_post") as caught:
        site(run, "text/q")
    assert "--sites 'text.*.q'" in str(caught.value)
    with pytest.raises(MissingSiteError, match=r"such as 'text/resid_post'\."):
        site(run, "resid_post")
    assert isinstance(caught.value, KeyError)


def test_info__counts_bytes(path: Path) -> None:
    info = run_info(path)
    raw = small_run.LAYERS * small_run.WIDTH * 4 * sum(map(small_run.token_count, range(12)))
    assert info["groups"]["text/resid_post"]["raw_bytes"] > raw
    stored = sum(
        p.stat().st_size
        for p in path.rglob("*")
        if p.is_file() and p.name not in ("zarr.json", "manifest.json")
    )
    # Fixed coordinates (layer numbers) are metadata in all but name and are not in the manifest.
    assert 0 <= stored - info["stored_bytes"] < 1000
    assert json.loads(json.dumps(info)) == info
    assert "made-up" in format_info(info)


def test_store__imports_no_torch() -> None:
    code = "import sys, mechanistic.store; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
