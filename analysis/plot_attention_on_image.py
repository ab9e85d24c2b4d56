"""Attention, rollout or flow over image tokens, drawn on the image, on the pixels that each token covers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError
from mechanistic.store.schema import KIND

from .attention_weights import PATTERN, pattern_of, plain_array
from .palette import VERMILLION, literal, new_axes, quantity, save
from .patch_density import overlaps, patch_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOX = ("box_x0", "box_y0", "box_x1", "box_y1")


def plot_attention_on_image(
    image: Any,
    attention: Any,
    *,
    num_patches: int | None = None,
    boxes: Any = None,
    sample: int | None = None,
    image_index: int = 0,
    tile: int | None = None,
    label: str = "",
    title: str = "",
    alpha: float = 0.75,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Overlay one row over image tokens on the image: attention, or what its rollout or flow makes of it.

    Where a model reads one place in several crops, such as the whole image and its tiles (anyres), each
    token's value is spread over its box, and a pixel shows the sum of those that cover it: the colours then
    say how much falls on 1,000 pixels.

    Parameters
    ----------
    image
        A PIL image, a path, or an array or tensor (height, width, 3), (3, height, width) or (height, width).
    attention (key,)
        One row. A DataArray or Dataset with labelled tokens, such as `attention_pattern`, `rollout_row`,
        `attention_rollout`, `attention_flow` or `cross_attention` give, brings the pixel boxes of its tokens,
        so that those of image `image_index` are drawn on the true patch grid, whatever the model's resizing
        did.
    sample
        Of rows of several samples, which one, by sample_index.
    tile
        Only the tokens of this crop.
    num_patches
        For a plain array: patches along one side of a square grid, or their total number.
    boxes (key, 4)
        For a plain array: x0, y0, x1, y1 of each token in pixels of `image`.
    label
        Of the colour bar; absent, the long name and units of the variable.
    alpha
        Opacity of the largest weight, 0 to 1; a weight of 0 leaves the image as it is.

    Raises
    ------
    DimensionError  more than one row, layer or sample, a number of weights that the grid does not have, or an
                    image of another shape.
    DataError       NaN, or no weight on this image.
    """
    if isinstance(attention, xr.Dataset):
        attention = _variable(attention)
    if isinstance(attention, xr.DataArray):
        label = label or quantity(attention, "" if attention.name else "attention weight")
        if boxes is None and num_patches is None:
            row = one_sample(attention, sample)
            attention, boxes = labelled_row(row, image_index, tile, several=True)
    weights = plain_array(attention)
    if weights.ndim != 1 or not weights.size:
        raise DimensionError(
            f"one row of weights is drawn; this array has the shape {weights.shape}.",
            "Pick a sample, a head and a query first, such as attention[0, 3, -1], or average heads.",
        )
    if np.isnan(weights).any():
        raise DataError(
            f"{np.isnan(weights).sum()} of {weights.size} weights are NaN.", "Pick another query."
        )
    pixels = image_pixels(image)
    height, width = pixels.shape[:2]
    places = square_boxes(weights.size, num_patches, width, height) if boxes is None else plain_array(boxes)
    if places.shape != (weights.size, 4):
        raise DimensionError(
            f"{weights.size} weights, but boxes of the shape {places.shape}.",
            "Give x0, y0, x1, y1 for each weight.",
        )
    figure, ax = new_axes(ax, picture_size(width, height))
    ax.imshow(pixels, extent=(0, width, height, 0))
    _overlay(figure, ax, weights, places, alpha, label or "attention weight (share of the row)")
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="x (pixel)", ylabel="y (pixel)")
    ax.set_title(literal(title), fontsize=10)
    save(figure, save_path)
    return figure, ax


def image_pixels(image: Any) -> NDArray[Any]:
    """An image of any usual kind as RGB (height, width, 3), float, 0 to 1.

    Raises
    ------
    DimensionError  it is not an image of one or three (or four, with opacity) channels.
    """
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as opened:
            image = opened.convert("RGB")
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    pixels = plain_array(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise DimensionError(
            f"an image has the shape (height, width, 3); this has {pixels.shape}.",
            "Pass one image, such as pixel_values[0], a path, or a PIL image.",
        )
    scaled = pixels / 255 if pixels.dtype.kind in "iu" else pixels.astype(np.float64)
    rgb = np.repeat(scaled, 3, axis=2) if pixels.shape[2] == 1 else scaled[..., :3]
    if rgb.min() < 0 or rgb.max() > 1:
        # A model's input is normalised; its colours are shown over their own range.
        rgb = (rgb - rgb.min()) / (rgb.max() - rgb.min())
    return np.asarray(rgb)


def _overlay(
    figure: Figure, ax: Axes, weights: NDArray[Any], places: NDArray[Any], alpha: float, label: str
) -> None:
    """One colour, the more opaque the more attention: what is not looked at stays as it is."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import ListedColormap, to_rgb
    from matplotlib.patches import Rectangle

    ramp = ListedColormap([(*to_rgb(VERMILLION), opacity) for opacity in np.linspace(0, alpha, 256)])
    overlay: ScalarMappable
    if overlaps(places):
        x_edges, y_edges, density = patch_density(weights, places)
        weights = 1000 * density
        label = f"{label[:-1]} / 1,000 pixels)" if label.endswith(")") else f"{label} / 1,000 pixels"
        overlay = ax.pcolormesh(x_edges, y_edges, weights, cmap=ramp, linewidth=0, antialiased=False)
    else:
        cells = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in places.tolist()]
        patches = PatchCollection(cells, cmap=ramp, linewidth=0, antialiased=False)
        patches.set_array(weights)
        overlay = ax.add_collection(patches)
    overlay.set_clim(0, float(weights.max()) or 1.0)
    figure.colorbar(overlay, ax=ax, label=literal(label))


def _variable(dataset: xr.Dataset) -> xr.DataArray:
    """The one variable of a result, or its attention_pattern."""
    names = [name for name, variable in dataset.data_vars.items() if variable.dtype.kind == "f"]
    return dataset[names[0]] if len(names) == 1 and PATTERN not in names else pattern_of(dataset)


def one_sample(row: xr.DataArray, sample: int | None) -> xr.DataArray:
    """The tokens of one sample, of an array whose tokens are of several.

    Raises
    ------
    DimensionError  there are several and none is chosen, or it is not there.
    """
    owner = row.coords.get("sample_index")
    if owner is None or owner.ndim != 1:
        return row
    held = np.unique(owner.values)
    if sample is None and len(held) > 1:
        raise DimensionError(
            f"these are rows of {len(held)} samples.", f"Draw one of them: sample={held[0]}."
        )
    if sample is not None and sample not in held:
        raise DimensionError(
            f"there is no sample {sample} here.", f"Choose of {', '.join(map(str, held[:8]))}."
        )
    chosen = owner.values == (held[0] if sample is None else sample)
    return row.isel({owner.dims[0]: np.flatnonzero(chosen)})


def labelled_row(
    row: xr.DataArray, image_index: int, tile: int | None, *, several: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The weights on one image's tokens and their pixel boxes, from the labels of the keys.

    Raises
    ------
    DimensionError  not one row, no labels, or several tiles and none chosen, unless `several` may be.
    DataError       nothing is on this image.
    """
    row = row.squeeze()
    prefix = "key_" if "key_kind" in row.coords else ""
    names = ("kind", "image_index", "tile", *BOX)
    missing = [name for name in names if prefix + name not in row.coords]
    if row.ndim != 1 or missing:
        raise DimensionError(
            f"one labelled row is drawn; this has the dimensions {', '.join(map(str, row.dims))}"
            + (f" and no labels {', '.join(missing)}." if missing else "."),
            "Choose one: attention_pattern(run, sample=, layer=, head=, query='last'), or .isel(layer=0).",
        )
    label = {name: np.asarray(row[prefix + name].values) for name in names}
    boxes = np.stack([label[name].astype(np.float64) for name in BOX], axis=1)
    drawn = (label["kind"] == KIND["image"]) & (label["image_index"] == image_index)
    drawn &= np.isfinite(boxes).all(axis=1)
    tiles = np.unique(label["tile"][drawn])
    if tile is None and len(tiles) > 1 and not several:
        raise DimensionError(
            f"this image is cut into the tiles {', '.join(map(str, tiles))}, which overlap.",
            f"Draw one of them: tile={tiles[0]}.",
        )
    if tile is not None:
        drawn &= label["tile"] == tile
    if not drawn.any():
        raise DataError(
            f"no key is a token of image {image_index}" + ("." if tile is None else f", tile {tile}."),
            "The labels image_index and tile of the keys tell which there are.",
        )
    return np.asarray(row.values)[drawn], boxes[drawn]


def square_boxes(count: int, num_patches: int | None, width: int, height: int) -> NDArray[np.float64]:
    """Boxes of a square grid, row by row."""
    side = math.isqrt(count)
    if side * side != count or (num_patches is not None and num_patches not in (side, count)):
        wanted = "a square grid" if num_patches is None else f"a grid of num_patches={num_patches}"
        raise DimensionError(
            f"{count} weights do not fill {wanted}.",
            "Drop CLS and text tokens first, or pass boxes=, the pixels of each token.",
        )
    rows, columns = np.divmod(np.arange(count), side)
    x, y = width / side, height / side
    return np.stack([columns * x, rows * y, (columns + 1) * x, (rows + 1) * y], axis=1)


def picture_size(width: int, height: int) -> tuple[float, float]:
    aspect = min(max(height / width, 0.3), 3.0)
    return (5.4, 4.2 * aspect + 0.5) if aspect <= 1 else (4.2 / aspect + 1.4, 4.6)
