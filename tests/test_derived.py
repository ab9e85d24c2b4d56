"""Results are stored with a run without changing what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import small_run
import xarray as xr
from test_store_parts import PARTS, write_part

from mechanistic.store import derived_names, merge, open_run, read_manifest, write_derived
from mechanistic.store.errors import (
    IncompleteRunError,
    OutputExistsError,
    SpecificationError,
    StoreError,
    UsageError,
)
from mechanistic.store.info import format_info, run_info
from mechanistic.store.merge import merge_run
from mechanistic.store.verify import verify_run


def result(value: float = 1.0) -> xr.Dataset:
    values = da.full((3, 5), value, chunks=(1, 5))
    return xr.Dataset(
        {"effect": (("layer", "pair"), values, {"units": "logit", "shape": (3, np.int64(5))})},
        {"layer": np.arange(3), "name": ("pair", np.array(list("abcde")))},
        {"seen": Path("somewhere")},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run.write_run(tmp_path / "run")


def test_write_derived__opens_with_the_run_and_leaves_its_content_alone(run: Path) -> None:
    before = read_manifest(run)
    write_derived(run, "swap", result())
    write_derived(run, "other", result(2))
    tree = open_run(run)
    assert derived_names(tree) == ["other", "swap"]
    held = tree["derived/swap"].to_dataset()
    assert held["effect"].chunks is not None
    assert (held["effect"] == 1).all()
    assert "".join(held["name"].values) == "abcde"
    assert held["effect"].attrs == {"units": "logit", "shape": [3, 5]}
    assert (held.attrs["seen"], "created" in held.attrs) == ("somewhere", True)
    assert read_manifest(run) == before
    assert verify_run(run) == []
    assert "derived  other, swap" in format_info(run_info(run))
    assert run_info(run)["content_sha256"] == tree.attrs["completeness"]["content_sha256"]
    plain = xr.open_datatree(run, engine="zarr", chunks={})
    assert (plain["derived/swap/effect"] == 1).all()


def test_write_derived__replaces_only_when_asked(run: Path) -> None:
    write_derived(run, "swap", result())
    with pytest.raises(OutputExistsError, match="derived/swap already"):
        write_derived(run, "swap", result(2))
    write_derived(run, "swap", result(2).isel(layer=[0]), replace=True)
    held = open_run(run)["derived/swap"].to_dataset()
    assert held["effect"].values.tolist() == [[2.0] * 5]


def test_write_derived__what_a_failed_one_leaves_is_ignored(run: Path) -> None:
    def fail(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    broken = result()
    broken["effect"] = broken["effect"].copy(data=broken["effect"].data.map_blocks(fail, dtype=float))
    with pytest.raises(ZeroDivisionError):
        write_derived(run, "swap", broken)
    write_derived(run, "other", result())
    assert derived_names(open_run(run)) == ["other"]
    write_derived(run, "swap", result())
    assert derived_names(open_run(run)) == ["other", "swap"]
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_write_derived__with_a_run_in_parts_and_after_its_merge(tmp_path: Path, elsewhere: bool) -> None:
    run = tmp_path / "run"
    for index in range(PARTS):
        write_part(run, index)
    write_derived(run, "swap", result())
    assert derived_names(open_run(run)) == ["swap"]
    assert "derived  swap" in format_info(run_info(run))
    assert verify_run(run) == []
    output = tmp_path / "merged" if elsewhere else None
    for _ in range(2):
        merged = merge_run(run, output)
    tree = open_run(merged)
    assert (tree["derived/swap/effect"] == 1).all()
    write_derived(merged, "other", result())
    assert derived_names(open_run(merged)) == ["other", "swap"]
    assert verify_run(merged) == []


@pytest.mark.parametrize(("where", "calls"), [("sync", 2), ("consolidate", 1)])
def test_write_derived__outlives_a_killed_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, calls: int
) -> None:
    run = tmp_path / "run"
    for index in range(PARTS):
        write_part(run, index)
    write_derived(run, "swap", result())
    seen: list[str] = []
    original = getattr(merge, where)

    def dying(*arguments: Any, **options: Any) -> None:
        seen.append(where)
        if len(seen) == calls:
            raise KeyboardInterrupt
        original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(merge, where, dying)
        with pytest.raises(KeyboardInterrupt):
            merge_run(run)
    merged = merge_run(run)
    assert derived_names(open_run(merged)) == ["swap"]
    assert verify_run(merged) == []
    assert not (run / "parts").exists()


def test_write_derived__refuses(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is a URL"):
        write_derived("https://example.org/run", "swap", result())
    for name in ("", "../swap", "a/b", "swap.partial", ".hidden"):
        with pytest.raises(SpecificationError, match="cannot be called"):
            write_derived(run, name, result())
    with pytest.raises(UsageError, match="there is no run"):
        write_derived(tmp_path / "none", "swap", result())
    write_part(tmp_path / "parts", 0)
    with pytest.raises(IncompleteRunError, match="unfinished"):
        write_derived(tmp_path / "parts", "swap", result())

    def refuse(*args: object, **settings: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="may not be written to"):
        write_derived(run, "swap", result())
