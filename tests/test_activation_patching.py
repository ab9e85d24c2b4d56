"""The experiment in one command, and the map it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from mechanistic.analysis import plot_patching
from mechanistic.analysis.cli import main
from mechanistic.store import derived_names, open_run
from mechanistic.store.errors import DimensionError


def test_activation_patching__captures_patches_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "--model-name spatial-tiny --dataset shapes --num-samples 8 --quiet"
    command = f"activation_patching {asked} --output-dir {tmp_path}"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    for name in ("patch_resid_pre.csv", "patch_resid_pre.png", "patch_z.csv", "patch_z.png"):
        assert (tmp_path / name).stat().st_size > 100
        assert name in printed
    run = open_run(tmp_path / "run")
    assert derived_names(run) == ["patch_resid_pre", "patch_z"]
    stamp = (tmp_path / "run" / "derived" / "patch_z" / "zarr.json").stat().st_mtime_ns
    assert main(command.split()) == 0
    assert (tmp_path / "run" / "derived" / "patch_z" / "zarr.json").stat().st_mtime_ns == stamp


def result(**dims: int) -> xr.Dataset:
    values = np.linspace(0, 1, int(np.prod(list(dims.values())))).reshape(tuple(dims.values()))
    coords = {"layer": np.array([0, 2, 5]), "role": ["image", "last"], "head": np.arange(4)}
    kept = {name: values for name, values in coords.items() if name in dims}
    return xr.Dataset({"recovered_mean": (tuple(dims), values)}, kept)


def test_plot_patching__has_true_labels() -> None:
    _, ax = plot_patching(result(layer=3, role=2), title="$5")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "2", "5"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["image", "last"]
    assert ax.get_title() == r"\$5"
    assert [text.get_text() for text in ax.texts] == ["0.00", "0.20", "0.40", "0.60", "0.80", "1.00"]
    _, ax = plot_patching(result(layer=3, role=2, head=4).sel(role="last"))
    assert ax.get_xlabel() == "head"
    assert len(ax.texts) == 12


def test_plot_patching__refuses_more_than_a_map() -> None:
    with pytest.raises(DimensionError, match=r"layer, role, head, which is more than a map"):
        plot_patching(result(layer=3, role=2, head=4))
    with pytest.raises(DimensionError, match="no result of patching"):
        plot_patching(xr.Dataset())
