"""A panel a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image
from test_cross_attention import make

from mechanistic.analysis.cross_attention import cross_attention
from mechanistic.analysis.plot_cross_attention_attribution import plot_cross_attention_attribution
from mechanistic.store.errors import DimensionError

IMAGE = Image.new("RGB", (64, 48), "white")
WORDS = ["the", "cup", "left", "plate"]
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(256), size=4)


def test_plot_cross_attention_attribution__call_of_the_users() -> None:
    figure, axes = plot_cross_attention_attribution(
        image=IMAGE, text_tokens=WORDS, cross_attention=WEIGHTS, num_patches=16
    )
    assert [ax.get_title() for ax in axes] == WORDS
    for row, ax in zip(WEIGHTS, axes, strict=True):
        np.testing.assert_array_equal(ax.collections[0].get_array(), row)
        # Patches tile the image as it is, not a square.
        box = ax.collections[0].get_paths()[-1].get_extents()
        np.testing.assert_allclose([box.x1, box.y1], [64, 48])
    figure.draw_without_rendering()


def test_plot_cross_attention_attribution__heads_in_front_are_averaged() -> None:
    stacked = np.random.default_rng(1).dirichlet(np.ones(9), size=(2, 3, 2))
    _, axes = plot_cross_attention_attribution(IMAGE, ["a", "b"], stacked)
    np.testing.assert_allclose(axes[1].collections[0].get_array(), stacked[:, :, 1].mean((0, 1)))


def test_plot_cross_attention_attribution__labels_bring_patches_and_words() -> None:
    found = cross_attention(make(), sample=4, layer=1)
    _, axes = plot_cross_attention_attribution(IMAGE, ["?"], found)
    [word] = axes
    row = found["cross_attention"].mean("head").sel(word="?")
    np.testing.assert_allclose(word.collections[0].get_array(), row)
    assert word.get_title() == f"?, {float(row.sum()):.2f} on the image"
    # The synthetic image is 64 pixels wide, in two patches.
    assert word.collections[0].get_paths()[0].get_extents().x1 == 32
    _, every = plot_cross_attention_attribution(IMAGE, cross_attention=found)
    assert len(every) == found.sizes["word"]


def test_plot_cross_attention_attribution__draws_where_told_and_saves(tmp_path: Path) -> None:
    own = Figure().subplots(2, 2)
    _, axes = plot_cross_attention_attribution(
        IMAGE, WORDS, WEIGHTS, ax=own, save_path=tmp_path / "words.png"
    )
    assert list(axes) == list(own.ravel())
    assert (tmp_path / "words.png").stat().st_size > 1000


def test_plot_cross_attention_attribution__errors() -> None:
    with pytest.raises(DimensionError, match="no weights to draw"):
        plot_cross_attention_attribution(IMAGE, WORDS)
    with pytest.raises(DimensionError, match="2 words for 4 rows"):
        plot_cross_attention_attribution(IMAGE, WORDS[:2], WEIGHTS)
    with pytest.raises(DimensionError, match=r"this has \(256,\)"):
        plot_cross_attention_attribution(IMAGE, WORDS, WEIGHTS[0])
    with pytest.raises(DimensionError, match=r"no 'cross_attention', only other"):
        plot_cross_attention_attribution(IMAGE, WORDS, xr.Dataset({"other": 1}))
    with pytest.raises(DimensionError, match=r"no word cup here\.\n  Choose of .*\?"):
        plot_cross_attention_attribution(IMAGE, ["cup"], cross_attention(make(), sample=0))
    with pytest.raises(DimensionError, match="do not fill a grid of num_patches=8"):
        plot_cross_attention_attribution(IMAGE, WORDS, WEIGHTS, num_patches=8)
