"""An attribution drawn on the image: what speaks for the answer in red, against it in blue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .attention_weights import plain_array
from .attribution_table import attribution_of
from .palette import BLUE, VERMILLION, literal, new_axes, quantity, save
from .plot_attention_on_image import image_pixels, labelled_row, one_sample, picture_size, square_boxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def plot_attribution_on_image(
    image: Any,
    attribution: Any,
    *,
    sample: int | None = None,
    num_patches: int | None = None,
    boxes: Any = None,
    image_index: int = 0,
    tile: int | None = None,
    label: str = "",
    title: str = "",
    alpha: float = 0.75,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Overlay an attribution on the image, each value on the pixels that its patch covers.

    Parameters
    ----------
    image
        As in `plot_attention_on_image`.
    attribution
        What `integrated_gradients` (to pixels or image embeddings), `gradcam` or `attention_relevancy`
        returns, or one row of it, which bring the pixel boxes of their patches; or a plain array (patch,).
    sample
        Which of several samples, by sample_index.
    num_patches, boxes
        For a plain array: patches along one side of a square grid or their number; or x0, y0, x1, y1 of each.
    image_index, tile
        With labels: which image of the sample, and which tile of it.
    label
        Of the colour bar; absent, that of the attribution.
    alpha
        Opacity of the largest magnitude, 0 to 1; an attribution of 0 leaves the image as it is.

    Raises
    ------
    DimensionError  not one row, several samples or tiles and none chosen, or a number that the grid lacks.
    DataError       NaN, or nothing on this image.
    """
    if isinstance(attribution, xr.Dataset):
        attribution = attribution_of(attribution)
    if isinstance(attribution, xr.DataArray) and boxes is None and num_patches is None:
        label = label or quantity(attribution, "" if attribution.name else "attribution")
        attribution, boxes = labelled_row(one_sample(attribution, sample), image_index, tile)
    values = plain_array(attribution)
    if values.ndim != 1 or not values.size:
        raise DimensionError(
            f"one value a patch is drawn; this array has the shape {values.shape}.",
            "Pick a word or a sample first, such as attribution[0].",
        )
    if not np.isfinite(values).all():
        raise DataError(f"{np.isnan(values).sum()} of {values.size} values are NaN.", "Leave them out first.")
    pixels = image_pixels(image)
    height, width = pixels.shape[:2]
    places = square_boxes(values.size, num_patches, width, height) if boxes is None else plain_array(boxes)
    if places.shape != (values.size, 4):
        raise DimensionError(
            f"{values.size} values, but boxes of the shape {places.shape}.", "Give x0, y0, x1, y1 for each."
        )
    figure, ax = new_axes(ax, picture_size(width, height))
    ax.imshow(pixels, extent=(0, width, height, 0))
    _overlay(figure, ax, values, places, alpha, label or "attribution")
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="x (pixel)", ylabel="y (pixel)")
    ax.set_title(literal(title), fontsize=10)
    save(figure, save_path)
    return figure, ax


def signed_ramp(values: NDArray[Any], alpha: float) -> tuple[Colormap, tuple[float, float]]:
    """Two colours, the more opaque the larger, and their limits; one where nothing speaks against."""
    from matplotlib.colors import ListedColormap, to_rgb

    steps = np.linspace(0, alpha, 128)
    against = [(*to_rgb(BLUE), opacity) for opacity in steps[::-1]] if values.min() < 0 else []
    ramp = ListedColormap([*against, *((*to_rgb(VERMILLION), opacity) for opacity in steps)])
    largest = float(np.abs(values).max()) or 1.0
    return ramp, (-largest if against else 0, largest)


def _overlay(
    figure: Figure, ax: Axes, values: NDArray[Any], places: NDArray[Any], alpha: float, label: str
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    ramp, limits = signed_ramp(values, alpha)
    cells = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in places.tolist()]
    overlay = PatchCollection(cells, cmap=ramp, linewidth=0, antialiased=False)
    overlay.set_array(values)
    overlay.set_clim(*limits)
    ax.add_collection(overlay)
    figure.colorbar(overlay, ax=ax, label=label)
