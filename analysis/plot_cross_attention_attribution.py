"""Where in the image each word looks, a panel a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError

from .attention_weights import plain_array
from .palette import literal, save
from .plot_attention_on_image import plot_attention_on_image
from .plot_multi_head_attention import panel_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROSS_ATTENTION = "cross_attention"


def plot_cross_attention_attribution(
    image: Any,
    text_tokens: Sequence[str] | None = None,
    cross_attention: Any = None,
    *,
    num_patches: int | None = None,
    image_index: int = 0,
    tile: int | None = None,
    title: str = "",
    ax: Sequence[Axes] | NDArray[Any] | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Draw the attention of each word over the image; every panel has its own scale.

    Parameters
    ----------
    image
        As in `plot_attention_on_image`.
    text_tokens
        The words. With the labels of `cross_attention` it chooses some of them by name; None means all.
    cross_attention (word, key)
        An array or tensor, or what `cross_attention` returns; dimensions in front, such as layers and heads,
        are averaged.
    num_patches
        For a plain array: patches along one side of a square grid, or their total number.
    image_index, tile
        With labels: which image of the sample, and which tile of it.
    ax
        Axes to draw on, one a word; the array of axes comes back.

    Raises
    ------
    DimensionError  no weights, a number of words or patches that does not fit, or no such word.
    DataError       NaN, or no weight on this image.
    """
    rows, words = _rows(cross_attention, text_tokens)
    labelled = isinstance(rows, xr.DataArray)
    figure, axes = panel_axes(len(words), ax, width=3.1, height=2.5)
    for place, (panel, word) in enumerate(zip(axes, words, strict=True)):
        row = rows.isel(word=place) if labelled else rows[place]
        heading = str(word)
        if labelled:
            heading += f", {float(row.where(row['image_index'] == image_index).sum()):.2f} on the image"
        plot_attention_on_image(
            image,
            row,
            num_patches=None if labelled else num_patches,
            image_index=image_index,
            tile=tile,
            label="share of the row",
            title=heading,
            ax=panel,
        )
        panel.set(xlabel="", ylabel="")
        panel.set_xticks([])
        panel.set_yticks([])
        scale = panel.collections[-1].colorbar.ax
        scale.tick_params(labelsize=7)
        scale.set_ylabel(scale.get_ylabel() if place == len(words) - 1 else "", fontsize=8)
    if title and ax is None:
        figure.suptitle(literal(title), fontsize=11)
    save(figure, save_path)
    return figure, axes


def _rows(values: Any, words: Sequence[str] | None) -> tuple[Any, list[str]]:
    """Weights (word, key), labelled where they were, and the words."""
    if isinstance(values, xr.Dataset):
        if CROSS_ATTENTION not in values:
            raise DimensionError(
                f"these data have no '{CROSS_ATTENTION}', only {', '.join(map(str, values.data_vars))}.",
                "Pass the result of cross_attention(run, sample=0), or a plain array (word, patch).",
            )
        values = values[CROSS_ATTENTION]
    if isinstance(values, xr.DataArray) and {"word", "key"} <= set(values.dims):
        rows = values.mean([dim for dim in values.dims if dim not in ("word", "key")])
        return _chosen(rows.transpose("word", "key"), words)
    if values is None:
        raise DimensionError(
            "there are no weights to draw.", "Pass cross_attention=, an array (word, patch)."
        )
    weights = plain_array(values).astype(np.float64)
    if weights.ndim < 2:
        raise DimensionError(
            f"attention of words to patches has the shape (word, patch); this has {weights.shape}.",
            "Pass one row a word, such as extract_cross_attention(model, image, text).",
        )
    weights = weights.mean(axis=tuple(range(weights.ndim - 2)))
    names = [f"token {place}" for place in range(len(weights))] if words is None else list(words)
    if len(names) != len(weights):
        raise DimensionError(
            f"there are {len(names)} words for {len(weights)} rows of attention.",
            "Give text_tokens= one text for each row.",
        )
    return weights, names


def _chosen(rows: xr.DataArray, words: Sequence[str] | None) -> tuple[xr.DataArray, list[str]]:
    held = [str(word) for word in rows["word"].values]
    if words is None:
        return rows, held
    if not len(words) or (missing := [word for word in words if word not in held]):
        raise DimensionError(
            f"there is no word {', '.join(map(str, missing if len(words) else words))} here.",
            f"Choose of {', '.join(held)}.",
        )
    return rows.isel(word=[held.index(word) for word in words]), list(words)
