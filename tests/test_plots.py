"""Pictures: what is drawn is what was given, texts are taken literally, no display is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from PIL import Image
from synthetic_run import synthetic_run

from mechanistic.analysis import (
    attention_mass,
    attention_pattern,
    linear_probe,
    plot_attention_heatmap,
    plot_attention_on_image,
    plot_head_map,
    plot_layers,
    plot_probe,
    summarize,
    with_samples,
)
from mechanistic.analysis.palette import BLUE, GREY, VERMILLION, colours
from mechanistic.analysis.plot_attention_on_image import image_pixels
from mechanistic.store.errors import DataError, DimensionError

RUN = synthetic_run()
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(17), size=(2, 3, 17))


def texts_of(figure: Any) -> list[str]:
    """Every text as it is drawn; raises where one does not render."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def drawn_cells(ax: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Weights and boxes (x0, y0, x1, y1) of an overlay."""
    (cells,) = [each for each in ax.collections if isinstance(each, PatchCollection)]
    boxes = [path.get_extents() for path in cells.get_paths()]
    return np.asarray(cells.get_array()), np.array([[b.x0, b.y0, b.x1, b.y1] for b in boxes])


def test_plots__the_calls_people_have_in_their_scripts(tmp_path: Path) -> None:
    attn_weights = np.random.default_rng(1).dirichlet(np.ones(4), size=(1, 2, 4))
    figure, ax = plot_attention_heatmap(
        attn_weights[0],
        tokens=["[CLS]", "left", "of", "[SEP]"],
        layer_name="Layer 0",
        save_path=str(tmp_path / "plots/mechanistic/attention_maps/layer0.png"),
    )
    assert (tmp_path / "plots/mechanistic/attention_maps/layer0.png").stat().st_size > 1000
    assert ax.get_title() == "Layer 0, mean of 2 heads"
    attention = np.random.default_rng(2).dirichlet(np.ones(257), size=(1, 2, 257))
    figure, ax = plot_attention_on_image(
        Image.new("RGB", (64, 48)),
        attention[0, 0, 0, 1:],
        num_patches=16,
        save_path=tmp_path / "overlay.png",
    )
    assert isinstance(figure, Figure)
    assert (tmp_path / "overlay.png").exists()
    plot_attention_heatmap(attn_weights[0][0], save_path=tmp_path / "attn_0.png")


def test_plots__take_tensors() -> None:
    import torch

    weights = torch.tensor(WEIGHTS).to(torch.bfloat16)
    plot_attention_heatmap(weights[0])
    plot_attention_on_image(torch.rand(3, 20, 30), weights[0, 0, 0, 1:], num_patches=4)


def test_plots__need_no_display_and_leave_pyplot_alone() -> None:
    code = (
        "import sys, numpy as np\n"
        "from mechanistic.analysis import plot_attention_heatmap\n"
        "plot_attention_heatmap(np.eye(3))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "MPLBACKEND": "TkAgg"})


def test_plots__draw_on_the_axes_given() -> None:
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert plot_attention_heatmap(np.eye(3), ax=first) == (figure, first)
    assert plot_attention_on_image(np.zeros((8, 8)), np.ones(4) / 4, ax=second) == (figure, second)


@pytest.mark.parametrize("token", ["$x$", r"\$a$b", "$", "_hidden", "%d", "{}", "a\nb", r"\frac{1}{2}"])
def test_plots__texts_are_taken_literally(token: str) -> None:
    figure, _ = plot_attention_heatmap(np.eye(2), tokens=[token, "plain"], layer_name=token)
    assert len(texts_of(figure)) > 4
    summary = xr.Dataset({"v": (("split", "layer"), [[1.0, 2.0]])}, {"split": [token], "layer": [0, 1]})
    figure, ax = plot_layers(summary.assign(n_sample=("split", [3])), "v", label=token, title=token)
    texts_of(figure)
    (shown,) = ax.get_legend().get_texts()
    assert shown.get_text().endswith(", n = 3")


def test_plot_attention_heatmap__draws_the_weights() -> None:
    for head, expected in ((None, WEIGHTS[0].mean(0)), (1, WEIGHTS[0, 1])):
        _, ax = plot_attention_heatmap(WEIGHTS[0], head=head)
        np.testing.assert_allclose(ax.images[0].get_array(), expected)


def test_plot_attention_heatmap__of_a_run_is_labelled() -> None:
    pattern = attention_pattern(RUN, sample=0, layer=1)
    figure, ax = plot_attention_heatmap(pattern, head=2)
    np.testing.assert_allclose(
        np.ma.filled(ax.images[0].get_array(), 0), pattern["attention_pattern"].sel(head=2).values
    )
    keys = [label.get_text() for label in ax.get_xticklabels()]
    assert keys[:2] == ["<s>", "<image> x 4"]
    assert keys[-2:] == ["assistant", "left"]
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "left"
    assert "attention weight (share of the row)" in texts_of(figure)


def test_plot_attention_heatmap__errors() -> None:
    with pytest.raises(DimensionError, match=r"this has the shape \(2, 3, 17, 17\)"):
        plot_attention_heatmap(WEIGHTS)
    with pytest.raises(DimensionError, match="no head 3"):
        plot_attention_heatmap(WEIGHTS[0], head=3)
    with pytest.raises(DimensionError, match="2 token texts for 17 keys"):
        plot_attention_heatmap(WEIGHTS[0], tokens=["a", "b"])
    with pytest.raises(DataError, match="1 of 4 weights are NaN"):
        plot_attention_heatmap([[1, 0], [np.nan, 1]])


def test_plot_attention_on_image__a_square_grid_fills_the_image() -> None:
    weights = np.arange(16) / 120
    for patches in (None, 4, 16):
        _, ax = plot_attention_on_image(np.zeros((40, 80, 3), np.uint8), weights, num_patches=patches)
        values, boxes = drawn_cells(ax)
        np.testing.assert_allclose(values, weights)
        assert boxes[0].tolist() == [0, 0, 20, 10]
        assert boxes[6].tolist() == [40, 10, 60, 20], "row 1, column 2"
        assert boxes[15].tolist() == [60, 30, 80, 40]


def test_plot_attention_on_image__of_a_run_uses_the_true_boxes() -> None:
    pattern = attention_pattern(RUN, sample=3, layer=0, head=1, query="last")
    figure, ax = plot_attention_on_image(Image.new("RGB", (64, 64)), pattern, title="layer 0")
    values, boxes = drawn_cells(ax)
    image = pattern["key_kind"].values == 1
    np.testing.assert_allclose(values, pattern["attention_pattern"].values[0, image])
    assert boxes.tolist() == [[0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]]
    assert {"x (pixel)", "y (pixel)", "layer 0"} <= set(texts_of(figure))


def test_plot_attention_on_image__boxes_may_be_given() -> None:
    boxes = [[0, 0, 5, 9], [5, 0, 20, 9]]
    _, ax = plot_attention_on_image(np.zeros((9, 20)), [0.25, 0.75], boxes=boxes)
    assert drawn_cells(ax)[1].tolist() == boxes


def test_plot_attention_on_image__errors() -> None:
    image = np.zeros((8, 8, 3))
    with pytest.raises(DimensionError, match="15 weights do not fill a square grid"):
        plot_attention_on_image(image, np.ones(15))
    with pytest.raises(DimensionError, match="16 weights do not fill a grid of num_patches=5"):
        plot_attention_on_image(image, np.ones(16), num_patches=5)
    with pytest.raises(DimensionError, match=r"the shape \(2, 8\)"):
        plot_attention_on_image(image, np.ones((2, 8)))
    with pytest.raises(DimensionError, match="4 weights, but boxes of the shape"):
        plot_attention_on_image(image, np.ones(4), boxes=np.zeros((3, 4)))
    with pytest.raises(DataError, match="1 of 4 weights are NaN"):
        plot_attention_on_image(image, [np.nan, 0, 0, 0])
    with pytest.raises(DimensionError, match="dimensions head, key"):
        plot_attention_on_image(image, attention_pattern(RUN, sample=0, layer=0, query="last"))
    pattern = attention_pattern(RUN, sample=0, layer=0, head=0, query="last").squeeze()
    with pytest.raises(DataError, match="no key is a token of image 1"):
        plot_attention_on_image(image, pattern, image_index=1)
    tiles = pattern.assign_coords(key_tile=("key", np.arange(pattern.sizes["key"])))
    assert len(drawn_cells(plot_attention_on_image(image, tiles)[1])[0]) == 4
    assert len(drawn_cells(plot_attention_on_image(image, tiles, tile=2)[1])[0]) == 1


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (6, 4), 255),
        np.full((4, 6), 255, np.uint8),
        np.ones((4, 6, 3)),
        np.ones((3, 4, 6), np.float32),
        np.full((4, 6, 4), 255, np.uint8),
    ],
)
def test_image_pixels__of_every_usual_kind(image: Any) -> None:
    pixels = image_pixels(image)
    assert pixels.shape == (4, 6, 3)
    assert (pixels == 1).all()


def test_image_pixels__other_sources(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.png")
    assert image_pixels(tmp_path / "red.png")[0, 0].tolist() == [1, 0, 0]
    normalised = image_pixels(np.linspace(-2, 2, 72).reshape(3, 4, 6))
    assert normalised.min() == 0
    assert normalised.max() == 1
    with pytest.raises(DimensionError, match=r"this has \(2, 4, 6, 7\)"):
        image_pixels(np.zeros((2, 4, 6, 7)))


def test_plot_layers__lines_intervals_and_sizes() -> None:
    mass = with_samples(attention_mass(RUN, tokens="last").mean("head", keep_attrs=True), RUN, "correct")
    summary = summarize(mass, by="correct").compute()
    _, ax = plot_layers(summary, "mass_image", title="last prompt token")
    for place, line in enumerate(ax.lines):
        np.testing.assert_allclose(line.get_ydata(), summary["mass_image"].values[place])
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(summary["mass_image_low"].values[0].min())
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    counts = summary["n_sample"].values
    assert labels == [f"incorrect, n = {counts[0]}", f"correct, n = {counts[1]}"]
    assert [line.get_color() for line in ax.lines] == [VERMILLION, BLUE]
    assert ax.get_ylabel() == "attention mass on image tokens"
    assert ax.get_xlabel() == "layer"


def test_plot_layers__one_sample_has_a_line_and_no_band() -> None:
    mass = attention_mass(RUN, tokens="last", sample=2).mean("head")
    figure, ax = plot_layers(summarize(mass), "mass_first")
    texts_of(figure)
    assert np.isfinite(ax.lines[0].get_ydata()).all()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["n = 1"]


def test_plot_layers__errors() -> None:
    summary = summarize(attention_mass(RUN, tokens="last"))
    with pytest.raises(DimensionError, match=r"no 'entropy' over layers; there are mass_image"):
        plot_layers(summary, "entropy")
    by_relation = summarize(with_samples(attention_mass(RUN, tokens="last"), RUN, "relation"), by="relation")
    with pytest.raises(DimensionError, match="has the dimensions relation, layer, head"):
        plot_layers(by_relation, "mass_image")


def test_plot_probe__accuracy_controls_and_chance() -> None:
    probe = linear_probe(
        synthetic_run(sets=10, direction_layer=3), target="relation", repetitions=3
    ).compute()
    figure, ax = plot_probe({"last": probe, "again": probe}, title="relation")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), probe["accuracy"])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), probe["shuffled_accuracy"])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["last, n = 40", "again, n = 40", "most frequent class, 25%", "labels shuffled"]
    texts_of(figure)
    with pytest.raises(DimensionError, match="no probe to draw"):
        plot_probe({})


def test_colours__splits_keep_theirs() -> None:
    assert colours(["incorrect", "unscored", "correct"]) == [VERMILLION, GREY, BLUE]
    others = colours(["left", "right", "above", "below", "correct"])
    assert len(set(others)) == 5


def test_plots__a_file_holds_all_of_a_title_that_is_wider_than_the_axes(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    title = "a title that goes on " * 5
    plot_head_map(xr.DataArray(np.ones((2, 3)), dims=("layer", "head")), title=title, save_path=path)
    dark = np.asarray(Image.open(path).convert("L")) < 128
    assert dark.any()
    assert not dark[:, [0, -1]].any(), "what touches an edge is cut"
