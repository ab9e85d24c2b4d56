"""plot_attribution_on_image: every patch on its pixels, for and against in two colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tiny_models import llava, picture, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import (
    attention_relevancy,
    gradcam,
    integrated_gradients,
    plot_attribution_on_image,
)
from mechanistic.analysis.palette import BLUE, VERMILLION
from mechanistic.store.errors import DataError, DimensionError

IMAGE = Image.new("RGB", (60, 40), "white")


def overlay(figure: Figure) -> PatchCollection:
    [found] = [each for each in figure.axes[0].collections if isinstance(each, PatchCollection)]
    figure.canvas.draw()
    return found


def corners(collection: PatchCollection) -> Any:
    return np.array([path.get_extents().extents for path in collection.get_paths()])


def test_plot_attribution_on_image__draws_for_and_against() -> None:
    boxes = [[0, 0, 30, 40], [30, 0, 60, 20], [30, 20, 60, 40]]
    figure, _ = plot_attribution_on_image(IMAGE, [2.0, -1.0, 0.0], boxes=boxes, label="logit")
    drawn = overlay(figure)
    np.testing.assert_allclose(corners(drawn), boxes)
    assert drawn.get_clim() == (-2, 2)
    for_, against, nothing = drawn.get_facecolor()
    np.testing.assert_allclose(for_, (*to_rgb(VERMILLION), 0.75), atol=0.02)
    np.testing.assert_allclose(against[:3], to_rgb(BLUE), atol=0.02)
    assert 0.3 < against[3] < 0.4
    assert nothing[3] < 0.02
    assert figure.axes[1].get_ylabel() == "logit"
    alone, _ = plot_attribution_on_image(IMAGE, [2.0, 1.0, 0.0, 4.0], num_patches=2)
    assert overlay(alone).get_clim() == (0, 4)


def test_plot_attribution_on_image__takes_what_the_attributions_return(tmp_path: Path) -> None:
    model, given = llava(), samples(2)
    found = integrated_gradients(model, given, to="pixels", baseline="zero", steps=2)
    figure, _ = plot_attribution_on_image(picture(10), found, sample=1, save_path=tmp_path / "ig.png")
    drawn = overlay(figure)
    mine = found["integrated_gradients"].values[(found["sample_index"] == 1) & (found["patch_row"] >= 0)]
    np.testing.assert_array_equal(drawn.get_array(), mine)
    np.testing.assert_allclose(corners(drawn)[9], [8, 8, 16, 16])
    assert figure.axes[1].get_ylabel() == "integrated gradients (logit)"
    assert (tmp_path / "ig.png").stat().st_size > 1000
    words = attention_relevancy(model, given[0], rows="words")["attention_relevancy"]
    plot_attribution_on_image(given[0].images[0], words.sel(word="red"), title="red")
    with pytest.raises(DimensionError, match=r"rows of 2 samples.\n  Draw one of them: sample=0"):
        plot_attribution_on_image(picture(10), found)
    with pytest.raises(DimensionError, match="no sample 7"):
        plot_attribution_on_image(picture(10), found, sample=7)
    with pytest.raises(DimensionError, match="one labelled row"):
        plot_attribution_on_image(picture(0), words)


def test_plot_attribution_on_image__asks_which_tile() -> None:
    family = ZOO["internvl"]
    sample = zoo_samples(family)[1]
    found = gradcam(family.build(), sample, relu=False)
    with pytest.raises(DimensionError, match=r"tiles 0, 1, 2, which overlap.\n  Draw one of them: tile=0"):
        plot_attribution_on_image(sample.images[1], found, image_index=1)
    figure, _ = plot_attribution_on_image(sample.images[1], found, image_index=1, tile=2)
    assert len(overlay(figure).get_paths()) == 16


def test_plot_attribution_on_image__says_what_is_wrong() -> None:
    with pytest.raises(DimensionError, match="one value a patch"):
        plot_attribution_on_image(IMAGE, np.zeros((2, 4)))
    with pytest.raises(DataError, match="1 of 4 values are NaN"):
        plot_attribution_on_image(IMAGE, [1.0, 2.0, np.nan, 1.0])
    with pytest.raises(DimensionError, match="boxes of the shape"):
        plot_attribution_on_image(IMAGE, [1.0, 2.0], boxes=[[0, 0, 1, 1]])
