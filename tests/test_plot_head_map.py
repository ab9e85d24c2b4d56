"""Head maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from mechanistic.analysis.plot_head_map import plot_head_map
from mechanistic.store.errors import DataError, DimensionError


def values(layers: int = 3, heads: int = 4) -> xr.DataArray:
    numbers = np.arange(layers * heads, dtype=float).reshape(heads, layers) - 4
    coords = {"layer": np.arange(layers) + 7, "head": np.arange(heads) * 2}
    return xr.DataArray(numbers, coords, ("head", "layer"), "worth", {"units": "logit", "long_name": "worth"})


def test_plot_head_map__shows_true_numbers_and_values() -> None:
    figure, ax = plot_head_map(values(), title="a_b $x$", n=1200)
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(drawn, values().transpose("layer", "head"))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["7", "8", "9"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "4", "6"]
    assert [text.get_text() for text in ax.texts][:2] == ["-4.00", "-1.00"]
    assert figure.axes[1].get_ylabel() == "worth (logit)"
    # The lowest layer is at the bottom.
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert ax.get_title() == r"a_b \$x\$, n = 1,200"
    figure.draw_without_rendering()


def test_plot_head_map__colours_are_centred() -> None:
    _, ax = plot_head_map(values(), centre=0)
    assert ax.images[0].get_clim() == (-7, 7)
    _, ax = plot_head_map(values())
    assert ax.images[0].get_clim() == (-4, 7)
    _, ax = plot_head_map(np.zeros((2, 2)), centre=0)
    assert ax.images[0].get_clim() == (-1, 1)


def test_plot_head_map__unknown_heads_are_blank() -> None:
    known = values()
    known[0, 0] = np.nan
    _, ax = plot_head_map(known)
    assert ax.images[0].get_array().mask[0, 0]
    assert len(ax.texts) == 11


def test_plot_head_map__large_maps_have_fewer_ticks_and_no_numbers() -> None:
    _, ax = plot_head_map(np.random.default_rng(0).normal(size=(36, 32)))
    assert not ax.texts
    assert len(ax.get_yticks()) == 18


def test_plot_head_map__draws_where_told_and_saves(tmp_path: Path) -> None:
    own = Figure().add_subplot()
    figure, ax = plot_head_map(np.eye(2), ax=own, save_path=tmp_path / "made" / "map.png")
    assert ax is own
    assert figure is own.figure
    assert (tmp_path / "made" / "map.png").stat().st_size > 1000


def test_plot_head_map__errors() -> None:
    with pytest.raises(DimensionError, match=r"these data have \(sample, head, layer\)\.\n  Average"):
        plot_head_map(values().expand_dims(sample=2))
    with pytest.raises(DimensionError, match=r"shape \(3,\)"):
        plot_head_map(np.ones(3))
    with pytest.raises(DataError, match="no head has a value"):
        plot_head_map(np.full((2, 2), np.nan))
