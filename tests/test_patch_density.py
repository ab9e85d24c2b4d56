"""Rows over image tokens whose boxes overlap, and what else is laid over an image."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from synthetic_run import synthetic_run
from test_plots import drawn_cells, texts_of

from mechanistic.analysis import attention_flow, attention_rollout, plot_attention_on_image, rollout_row
from mechanistic.analysis.patch_density import overlaps, patch_density
from mechanistic.store.errors import DimensionError

WHOLE = np.array([[0, 0, 20, 10]])
TILES = np.array([[0, 0, 10, 10], [10, 0, 20, 10]])
RUN = synthetic_run(query_tokens="all")
IMAGE = np.zeros((64, 64, 3))


def test_patch_density__by_hand() -> None:
    x_edges, y_edges, density = patch_density(np.array([0.5, 0.2, 0.3]), np.concatenate([WHOLE, TILES]))
    assert x_edges.tolist() == [0, 10, 20]
    assert y_edges.tolist() == [0, 10]
    np.testing.assert_allclose(density, [[0.5 / 200 + 0.2 / 100, 0.5 / 200 + 0.3 / 100]])


def test_patch_density__equals_painting_pixel_by_pixel_and_keeps_the_mass() -> None:
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 30, (40, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 10, (40, 2))], axis=1)
    weights = rng.dirichlet(np.ones(40))
    painted = np.zeros((40, 40))
    for weight, (x0, y0, x1, y1) in zip(weights, boxes, strict=True):
        painted[y0:y1, x0:x1] += weight / ((x1 - x0) * (y1 - y0))
    x_edges, y_edges, density = patch_density(weights, boxes)
    for row, y in enumerate(y_edges[:-1].astype(int)):
        np.testing.assert_allclose(density[row], painted[y, x_edges[:-1].astype(int)], atol=1e-12)
    cells = np.diff(y_edges)[:, None] * np.diff(x_edges)
    assert float((density * cells).sum()) == pytest.approx(1)


def test_overlaps__touching_boxes_do_not() -> None:
    assert not overlaps(TILES)
    assert not overlaps(TILES + np.array([[0, 0, 1e-4, 0], [0, 0, 0, 0]]))
    assert overlaps(np.concatenate([WHOLE, TILES]))


def test_plot_attention_on_image__overlapping_tiles_are_summed_on_their_pixels() -> None:
    boxes = np.concatenate([WHOLE, TILES])
    figure, ax = plot_attention_on_image(np.zeros((10, 20, 3)), [0.5, 0.2, 0.3], boxes=boxes)
    (mesh,) = [each for each in ax.collections if isinstance(each, QuadMesh)]
    np.testing.assert_allclose(np.ravel(mesh.get_array()), [4.5, 5.5])
    assert "attention weight (share of the row / 1,000 pixels)" in texts_of(figure)


def test_plot_attention_on_image__rollout_and_flow() -> None:
    rolled = rollout_row(RUN).compute()
    figure, ax = plot_attention_on_image(IMAGE, rolled.isel(layer=0), sample=3)
    mine = (rolled["sample_index"] == 3) & (rolled["kind"] == 1)
    np.testing.assert_allclose(drawn_cells(ax)[0], rolled["attention_rollout"].values[0, mine.values])
    assert "attention rollout" in texts_of(figure)
    square = attention_rollout(RUN, sample=3).isel(layer=-1, query=-1)
    figure, ax = plot_attention_on_image(IMAGE, square)
    assert drawn_cells(ax)[1].tolist()[3] == [32, 32, 64, 64]
    flow = attention_flow(RUN, sample=3).compute()
    figure, ax = plot_attention_on_image(IMAGE, flow, label="flow of the last token")
    values = flow["attention_flow"].values[0, flow["key_kind"].values == 1]
    np.testing.assert_allclose(drawn_cells(ax)[0], values)
    assert "flow of the last token" in texts_of(figure)


def test_plot_attention_on_image__one_row_of_one_sample() -> None:
    rolled = rollout_row(RUN).compute()
    with pytest.raises(DimensionError, match=r"rows of 12 samples.\n  Draw one of them: sample=0"):
        plot_attention_on_image(IMAGE, rolled.isel(layer=0))
    with pytest.raises(DimensionError, match="no sample 99 here"):
        plot_attention_on_image(IMAGE, rolled.isel(layer=0), sample=99)
    with pytest.raises(DimensionError, match=r"dimensions layer, token.*\n  .*isel\(layer=0\)"):
        plot_attention_on_image(IMAGE, rolled, sample=0)
