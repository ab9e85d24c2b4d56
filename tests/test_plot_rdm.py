"""Pictures of dissimilarities and of the logit lens: what is drawn is what was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist, squareform
from sklearn.manifold import ClassicalMDS
from synthetic_run import RELATIONS, synthetic_run

from mechanistic.analysis import with_samples
from mechanistic.analysis.plot_logit_lens import plot_logit_lens
from mechanistic.analysis.plot_mds import classical_mds, plot_mds
from mechanistic.analysis.plot_rdm import plot_rdm
from mechanistic.analysis.rdm import representational_dissimilarity
from mechanistic.store.errors import DataError, DimensionError

RUN = synthetic_run(sets=6, direction_layer=2)
RDM = with_samples(representational_dissimilarity(RUN), RUN, ["relation"])
POINTS = np.random.default_rng(0).normal(size=(9, 2))


def texts_of(figure: Any) -> list[str]:
    """Every text as it is drawn; raises where one does not render."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def lens(probability: Any, **labels: Any) -> xr.Dataset:
    """What logit_lens returns of four options, for the right answer's probabilities (layer, sample)."""
    values = np.asarray(probability, np.float64)
    rest = np.repeat((1 - values)[..., None] / 3, 3, axis=-1)
    logits = np.log(np.concatenate([values[..., None], rest], axis=-1))
    return xr.Dataset(
        {
            "answer_probability": (("layer", "sample"), values),
            "option_logit": (("layer", "sample", "option"), logits),
            "logit_gap": (("layer", "sample"), logits[..., 0] - logits[..., 1]),
            "lens_correct": (("layer", "sample"), (logits[..., 0] > logits[..., 1]).astype(float)),
        },
        {
            "layer": [2, 5, 8][: len(values)],
            "sample_index": ("sample", np.arange(values.shape[1])),
            **{name: ("sample", column) for name, column in labels.items()},
        },
    )


def test_plot_rdm__draws_the_matrix_sorted_by_a_label(tmp_path: Path) -> None:
    figure, ax = plot_rdm(RDM, layer=2, by="relation", save_path=tmp_path / "new" / "rdm.png")
    order = np.argsort(RDM["relation"].values.astype(str), kind="stable")
    expected = RDM["dissimilarity"].sel(layer=2).values[np.ix_(order, order)]
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [label.get_text() for label in ax.get_xticklabels()] == sorted(RELATIONS)
    assert ax.get_xticks().tolist() == [2.5, 8.5, 14.5, 20.5]
    texts = texts_of(figure)
    assert "condition, by relation (n = 24)" in texts
    assert "1 - Pearson correlation of the patterns" in texts
    assert ax.get_title() == "layer 2"
    assert (tmp_path / "new" / "rdm.png").stat().st_size > 1000


def test_plot_rdm__names_few_conditions_and_takes_axes() -> None:
    few = representational_dissimilarity(RUN, conditions="relation", metric="euclidean", layer=1)
    figure = Figure()
    axes = figure.subplots()
    assert plot_rdm(few, ax=axes) == (figure, axes)
    assert axes.get_xlabel() == "condition (n = 4, of 24 rows)"
    assert [label.get_text() for label in axes.get_yticklabels()] == sorted(RELATIONS)


def test_plot_rdm__averages_what_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(49.0).reshape(7, 7)
    rdm = xr.Dataset({"dissimilarity": (("condition", "other"), values)})
    monkeypatch.setattr(sys.modules["mechanistic.analysis.plot_rdm"], "MAX_CELLS", 4)
    _, ax = plot_rdm(rdm)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (4, 4)
    assert drawn[0, 0] == values[:2, :2].mean()
    assert drawn[3, 3] == values[6, 6]
    assert ax.get_xlim() == (-0.5, 6.5)


def test_classical_mds__recovers_points() -> None:
    squared = squareform(pdist(POINTS, "sqeuclidean"))
    points, share = classical_mds(squared)
    np.testing.assert_allclose(squareform(pdist(points, "sqeuclidean")), squared, atol=1e-9)
    assert share.sum() == pytest.approx(1)
    theirs = ClassicalMDS(n_components=2, metric="precomputed").fit_transform(np.sqrt(squared))
    np.testing.assert_allclose(np.abs(points), np.abs(theirs), atol=1e-8)


def test_plot_mds__colours_by_a_label() -> None:
    figure, ax = plot_mds(RDM, layer=2, by="relation", title="$x$")
    drawn = np.concatenate([np.asarray(each.get_offsets()) for each in ax.collections])
    expected = classical_mds(RDM["dissimilarity"].sel(layer=2).values)[0]
    order = np.argsort(RDM["relation"].values.astype(str), kind="stable")
    np.testing.assert_allclose(drawn, expected[order])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"{name}, n = 6" for name in sorted(RELATIONS)
    ]
    texts_of(figure)


def test_plot_mds__names_few_conditions() -> None:
    figure, _ = plot_mds(representational_dissimilarity(RUN, conditions="relation", layer=2))
    assert set(RELATIONS) <= set(texts_of(figure))


def test_plot_logit_lens__draws_means_and_the_guess() -> None:
    values = [[0.25, 0.3, 0.2], [0.5, 0.4, 0.6], [0.9, 1 - 1e-6, 0.8]]
    figure, ax = plot_logit_lens(lens(values))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.mean(values, axis=1))
    assert ax.lines[0].get_xdata().tolist() == [2, 5, 8]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 0.25)
    assert {"n = 3", "guess among the options, 25%"} <= set(texts_of(figure))


def test_plot_logit_lens__splits_and_leaves_out_unknown_answers() -> None:
    values = np.full((2, 5), 0.5)
    values[:, 4] = np.nan
    data = lens(values, correct=["yes", "yes", "no", "no", "no"])
    figure, ax = plot_logit_lens(data, variable="logit_gap", by="correct")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["no, n = 2", "yes, n = 2"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.log(3))
    texts_of(figure)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: plot_rdm(RDM), DimensionError, "there are 4 matrices, one a layer"),
        (lambda: plot_rdm(RDM, layer=9), DimensionError, "no layer 9 here; the layers are 0, 1, 2, 3"),
        (lambda: plot_rdm(RDM, layer=1, by="colour"), DimensionError, "no label 'colour'"),
        (lambda: plot_rdm(xr.Dataset()), DimensionError, "no dissimilarity"),
        (lambda: classical_mds(np.zeros((4, 4))), DataError, "all conditions are alike"),
        (
            lambda: classical_mds(np.full((4, 4), np.nan)),
            DataError,
            "4 conditions with 16 values that are not finite",
        ),
        (
            lambda: plot_logit_lens(lens([[0.5]]), variable="entropy"),
            DimensionError,
            "no 'entropy' of a logit lens",
        ),
        (lambda: plot_logit_lens(lens([[np.nan]])), DimensionError, "none of 1 rows has a known answer"),
    ],
)
def test_plot_rdm__refuses(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
