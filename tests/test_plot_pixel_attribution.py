"""plot_pixel_attribution: the pixels that the model read, back where they came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_patch import bright_sample, one_patch
from PIL import Image
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import gradcam, integrated_gradients, plot_pixel_attribution
from mechanistic.capture import Sample
from mechanistic.store.errors import DataError, DimensionError


def drawn(figure: Any) -> Any:
    figure.canvas.draw()
    return figure.axes[0].images[1]


def test_plot_pixel_attribution__by_hand() -> None:
    # Left half white, right half black, twice as wide as high: the middle square is read, scaled by 2.
    picture = Image.new("RGB", (256, 128), "black")
    picture.paste("white", (0, 0, 128, 128))
    sample = Sample(sample_id="half", images=(picture,), question=bright_sample()[0].question)
    model = one_patch()
    model.processor.image_processor.size = {"shortest_edge": 64}
    model.processor.image_processor.do_center_crop = True
    model.processor.image_processor.crop_size = {"height": 64, "width": 64}
    found = integrated_gradients(
        model, sample, to="pixels", baseline="zero", target=("left", "right"), steps=2
    )
    figure, _ = plot_pixel_attribution(picture, found)
    overlay = drawn(figure)
    assert overlay.get_extent() == [64, 192, 128, 0]
    values = np.asarray(overlay.get_array())
    # Where the image is 1 at the left and -1 at the right, so is what it adds.
    np.testing.assert_allclose(values[:, :31], values.max(), rtol=1e-4)
    np.testing.assert_allclose(values[:, 33:], -values.max(), rtol=1e-4)
    assert figure.axes[1].get_ylabel() == "integrated gradients of the pixel (logit)"


@pytest.mark.parametrize(("name", "tile"), [("qwen2_vl", 0), ("llava_next", 2), ("internvl", 2)])
def test_plot_pixel_attribution__covers_the_patches(name: str, tile: int) -> None:
    family = ZOO[name]
    sample = zoo_samples(family)[1]
    found = integrated_gradients(family.build(), sample, to="pixels", steps=2)
    figure, _ = plot_pixel_attribution(sample.images[1], found, image_index=1, tile=tile)
    x0, x1, y1, y0 = drawn(figure).get_extent()
    mine = found.isel(patch=(found["image_index"].values == 1) & (found["tile"].values == tile))
    width, height = sample.images[1].size
    np.testing.assert_allclose(max(x0, 0), np.nanmin(mine["box_x0"]), atol=1e-3)
    np.testing.assert_allclose(min(x1, width), np.nanmax(mine["box_x1"]), atol=1e-3)
    np.testing.assert_allclose(max(y0, 0), np.nanmin(mine["box_y0"]), atol=1e-3)
    np.testing.assert_allclose(min(y1, height), np.nanmax(mine["box_y1"]), atol=1e-3)


def test_plot_pixel_attribution__says_what_is_wrong() -> None:
    sample, _ = bright_sample()
    model = one_patch()
    with pytest.raises(DimensionError, match=r"no attribution of pixels.\n  Make one"):
        plot_pixel_attribution(sample.images[0], gradcam(model, sample))
    found = integrated_gradients(model, sample, to="pixels", steps=1)
    with pytest.raises(DataError, match="no sample 0, image 0, tile 4"):
        plot_pixel_attribution(sample.images[0], found, tile=4)
