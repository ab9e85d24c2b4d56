"""Integrated gradients of every pixel that the model reads, laid over the image that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .palette import literal, new_axes, quantity, save
from .plot_attention_on_image import image_pixels, picture_size
from .plot_attribution_on_image import signed_ramp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_pixel_attribution(
    image: Any,
    attribution: xr.Dataset,
    *,
    sample: int = 0,
    image_index: int = 0,
    tile: int = 0,
    title: str = "",
    alpha: float = 0.9,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Overlay `pixel_attribution` on the original image, whatever was resized, cropped or padded.

    Parameters
    ----------
    image
        As in `plot_attention_on_image`.
    attribution
        What ``integrated_gradients(..., to="pixels")`` returns.
    alpha
        Opacity of the largest magnitude, 0 to 1; pixels without attribution leave the image as it is.

    Raises
    ------
    DimensionError  the attribution is not to pixels.
    DataError       there is no such sample, image or tile.
    """
    if "pixel_attribution" not in attribution.data_vars:
        raise DimensionError(
            "these data hold no attribution of pixels.",
            "Make one: integrated_gradients(model, samples, to='pixels').",
        )
    wanted = (sample, image_index, tile)
    names = ("canvas_sample_index", "canvas_image_index", "canvas_tile")
    found = np.all([attribution[name].values == at for name, at in zip(names, wanted, strict=True)], axis=0)
    if not found.any():
        raise DataError(
            f"there is no sample {sample}, image {image_index}, tile {tile}.",
            f"The coordinates {', '.join(names)} tell which there are.",
        )
    canvas = attribution["pixel_attribution"].isel(canvas=int(np.flatnonzero(found)[0]))
    values = canvas.dropna("y", how="all").dropna("x", how="all").values
    pixels = image_pixels(image)
    height, width = pixels.shape[:2]
    figure, ax = new_axes(ax, picture_size(width, height))
    ax.imshow(pixels, extent=(0, width, height, 0))
    ramp, limits = signed_ramp(values, alpha)
    x0, x1 = _edges(attribution, wanted, "x", values.shape[1])
    y0, y1 = _edges(attribution, wanted, "y", values.shape[0])
    drawn = ax.imshow(
        values, cmap=ramp, vmin=limits[0], vmax=limits[1], extent=(x0, x1, y1, y0), interpolation="nearest"
    )
    figure.colorbar(drawn, ax=ax, label=quantity(canvas, "" if canvas.name else "attribution"))
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="x (pixel)", ylabel="y (pixel)")
    ax.set_title(literal(title), fontsize=10)
    save(figure, save_path)
    return figure, ax


def _edges(
    attribution: xr.Dataset, canvas: tuple[int, int, int], axis: str, size: int
) -> tuple[float, float]:
    """Where in the original image a canvas of `size` pixels begins and ends, from the boxes of its patches.

    Boxes are cut at the edges of the image; those that are not are the widest.
    """
    names = ("sample_index", "image_index", "tile")
    here = np.all([attribution[name].values == at for name, at in zip(names, canvas, strict=True)], axis=0)
    low, high = (attribution[f"box_{axis}{end}"].values[here].astype(np.float64) for end in (0, 1))
    place = attribution["patch_col" if axis == "x" else "patch_row"].values[here]
    step = float(np.nanmax(high - low))
    whole: NDArray[np.bool_] = high - low > step * (1 - 1e-4)
    start = float(np.median(low[whole] - place[whole] * step))
    return start, start + size / attribution.attrs["patch_size"] * step
