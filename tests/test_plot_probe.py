"""A picture of probes shows their scores, their controls and what no information would score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from mechanistic.analysis import linear_probe, plot_probe
from mechanistic.store.errors import DimensionError

ROWS = 80


def rows(heads: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(0)
    side = np.tile([0, 1], ROWS // 2)
    shape = (3, ROWS, heads, 6) if heads else (3, ROWS, 6)
    values = rng.normal(size=shape)
    values[1] += 2 * (side[:, None, None] if heads else side[:, None]) * rng.normal(size=6)
    dims = ("layer", "sample", "head", "d") if heads else ("layer", "sample", "d")
    names = np.array(["left", "right"], object)
    return xr.Dataset(
        {"z": (dims, values.astype(np.float32))},
        {
            "layer": [2, 4, 9],
            **({"head": np.arange(heads) + 5} if heads else {}),
            "side": ("sample", names[side]),
            "other": ("sample", names[rng.integers(0, 2, ROWS)]),
            "x": ("sample", values[1].reshape(ROWS, -1)[:, 0] + 0.1 * rng.normal(size=ROWS)),
            "y": ("sample", rng.normal(size=ROWS)),
            "word": ("sample", np.tile(np.repeat(list("abcd"), 2), ROWS // 8).astype(object)),
        },
    )


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_probe__r2_of_several_targets() -> None:
    probe = linear_probe(rows(), target=["x", "y"], repetitions=2)
    figure, ax = plot_probe(probe)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), probe["r2"].isel(target=0))
    assert legend(ax) == ["x, n = 80", "y, n = 80", "mean of the target", "labels shuffled"]
    assert "R^2" in ax.get_ylabel()
    assert ax.get_ylim()[0] < 0
    figure.canvas.draw()


def test_plot_probe__control_task_and_selectivity() -> None:
    probe = linear_probe(rows(), target="side", control="word", repetitions=2)
    _, ax = plot_probe(probe)
    drawn = [line.get_ydata() for line in ax.lines]
    for name in ("accuracy", "shuffled_accuracy", "control_accuracy"):
        assert any(np.array_equal(line, probe[name].values) for line in drawn), name
    assert legend(ax)[-2:] == ["labels shuffled", "control task"]
    _, ax = plot_probe(probe, variable="selectivity")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), probe["selectivity"])
    assert "no better than the control" in legend(ax)


def test_plot_probe__heads_are_a_map(tmp_path: Path) -> None:
    probe = linear_probe(rows(heads=3), target="side", repetitions=2)
    figure, ax = plot_probe(probe, title="side", save_path=tmp_path / "map.png")
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), probe["accuracy"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5", "6", "7"]
    assert ax.get_title() == "side, n = 80"
    assert (tmp_path / "map.png").exists()
    # White is chance: both ends are equally far from it.
    low, high = ax.images[0].get_clim()
    assert low + high == pytest.approx(2 * float(probe["chance"]))
    _, ax = plot_probe(probe.sel(head=6))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), probe["accuracy"].sel(head=6))
    figure.canvas.draw()


def test_plot_probe__errors() -> None:
    probe = linear_probe(rows(), target="side", repetitions=2)
    with pytest.raises(DimensionError, match="no probe to draw with selectivity"):
        plot_probe(probe, variable="selectivity")
    heads = linear_probe(rows(heads=2), target=["side", "other"], repetitions=2)
    with pytest.raises(DimensionError, match="these are 2 maps of layers and heads: side, other"):
        plot_probe(heads)
