"""Panels of several heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.analysis.plot_multi_head_attention import plot_multi_head_attention
from mechanistic.store.errors import DataError, DimensionError

WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(5), size=(6, 5))


def test_plot_multi_head_attention__a_panel_a_head_on_one_scale() -> None:
    figure, axes = plot_multi_head_attention(WEIGHTS, tokens=list("abcd$"), layer_name="layer 3")
    assert len(axes) == 6
    for place, ax in enumerate(axes):
        np.testing.assert_array_equal(ax.images[0].get_array(), WEIGHTS[place])
        assert ax.images[0].get_clim() == (0, WEIGHTS.max())
        assert ax.get_title() == f"head {place}"
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["a", "b", "c", "d", r"\$"]
    assert figure.get_suptitle() == "layer 3"
    figure.draw_without_rendering()


def test_plot_multi_head_attention__true_numbers_and_texts_of_a_pattern() -> None:
    pattern = attention_pattern(synthetic_run(), sample=0, layer=1, head=[1, 3])
    _, axes = plot_multi_head_attention(pattern, heads=[3])
    assert [ax.get_title() for ax in axes] == ["head 3"]
    np.testing.assert_allclose(axes[0].images[0].get_array().filled(0), pattern["attention_pattern"][1])
    assert "<image>" in [text.get_text() for text in axes[0].get_xticklabels()]
    # A key that a query may not look at is no weight of 0.
    assert axes[0].images[0].get_array().mask[0, -1]


def test_plot_multi_head_attention__draws_where_told_and_saves(tmp_path: Path) -> None:
    own = Figure().subplots(2, 3)
    figure, axes = plot_multi_head_attention(WEIGHTS, ax=own, save_path=tmp_path / "heads.png")
    assert list(axes) == list(own.ravel())
    assert figure is own[0, 0].figure
    assert (tmp_path / "heads.png").stat().st_size > 1000


def test_plot_multi_head_attention__errors() -> None:
    with pytest.raises(DimensionError, match=r"shape \(5, 5\)\.\n  Pick one sample.*plot_attention_heatmap"):
        plot_multi_head_attention(WEIGHTS[0])
    with pytest.raises(DimensionError, match=r"no head 9 here\.\n  Choose of 0, 1"):
        plot_multi_head_attention(WEIGHTS, heads=[9])
    with pytest.raises(DimensionError, match="2 token texts for 5 keys"):
        plot_multi_head_attention(WEIGHTS, tokens=["a", "b"])
    with pytest.raises(DimensionError, match="6 panels, but 1 axes"):
        plot_multi_head_attention(WEIGHTS, ax=[Figure().add_subplot()])
    with pytest.raises(DataError, match="1 of 150 weights are NaN"):
        plot_multi_head_attention(np.where(np.arange(150).reshape(6, 5, 5) == 3, np.nan, WEIGHTS))
