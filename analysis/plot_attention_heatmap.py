"""An attention pattern as a picture: a row for each query, a column for each key."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .attention_weights import pattern_of, plain_array
from .palette import NOTHING, SEQUENTIAL, literal, new_axes, one_line, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS = 60
MIN_RUN = 4


def plot_attention_heatmap(
    attention: Any,
    *,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    layer_name: str | None = None,
    head: int | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw one attention pattern, coloured by the square root of the weights; grey where they are 0.

    Several heads are averaged unless `head` picks one.

    Parameters
    ----------
    attention
        Weights (query, key) or (head, query, key): an array, a tensor, a DataArray, or a Dataset with
        attention_pattern, whose token texts then label the axes.
    tokens
        Texts of the keys, and of the queries where there are as many; `query_tokens` where they differ.
    layer_name
        The title, to which the heads shown are added.
    vmax
        The weight of the brightest colour; the largest weight by default, the smallest being 0.

    Raises
    ------
    DimensionError  not two or three dimensions, no such head, or as many texts as no axis has.
    DataError       NaN.
    """
    from matplotlib.colors import PowerNorm

    weights, queries, keys = _labelled(attention)
    shown, heads = _one_pattern(weights, head)
    texts = _axis_texts(shown.shape, tokens, query_tokens, queries, keys)
    figure, ax = new_axes(ax, _size(shown.shape))
    # By the square root: the first rows of a causal pattern are near 1, what is of interest is far below.
    scale = PowerNorm(0.5, vmin=0, vmax=float(shown.max()) if vmax is None else vmax)
    ax.set_facecolor(NOTHING)
    seen = np.ma.masked_equal(shown, 0)
    image = ax.imshow(seen, cmap=SEQUENTIAL, norm=scale, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=ax, label="attention weight (share of the row)")
    _label_axis(ax.yaxis, "query", shown.shape[0], texts[0])
    _label_axis(ax.xaxis, "key", shown.shape[1], texts[1], rotation=90)
    ax.set_title(literal(", ".join(part for part in (layer_name, heads) if part)), fontsize=10)
    save(figure, save_path)
    return figure, ax


def _label_axis(axis: Any, role: str, length: int, texts: Sequence[str] | None, **style: Any) -> None:
    if texts is None:
        axis.set_label_text(f"{role} (position)")
        return
    places, shown = _joined(texts)
    step = -(-len(places) // MAX_LABELS)
    axis.set_ticks(places[::step], [one_line(text) for text in shown[::step]], fontsize=8, **style)
    axis.set_label_text(f"{role} token")


def _joined(texts: Sequence[str]) -> tuple[list[float], list[str]]:
    """Where to label what: a run of one text, such as an image's tokens, gets one label at its middle."""
    places: list[float] = []
    shown: list[str] = []
    start = 0
    for text, run in groupby(texts):
        count = len(list(run))
        if count < MIN_RUN:
            places += [float(start + number) for number in range(count)]
            shown += [text] * count
        else:
            places.append(start + (count - 1) / 2)
            shown.append(f"{text} x {count}")
        start += count
    return places, shown


def _labelled(attention: Any) -> tuple[NDArray[Any], list[str] | None, list[str] | None]:
    """The weights, and the texts of queries and keys where they carry them."""
    if isinstance(attention, xr.Dataset):
        attention = pattern_of(attention)
    if not isinstance(attention, xr.DataArray):
        return plain_array(attention).astype(np.float64), None, None
    ends = [dim for dim in ("query", "key") if dim in attention.dims]
    attention = attention.transpose(..., *ends)
    attention = attention.squeeze([dim for dim in attention.dims[:-2] if attention.sizes[dim] == 1])
    found = []
    for role in ("query", "key"):
        name = f"{role}_token_text"
        labelled = name in attention.coords and attention[name].dims == (role,)
        found.append([str(text) for text in attention[name].values] if labelled else None)
    return np.asarray(attention.values, np.float64), found[0], found[1]


def _one_pattern(weights: NDArray[Any], head: int | None) -> tuple[NDArray[Any], str | None]:
    if weights.ndim not in (2, 3):
        raise DimensionError(
            f"a heatmap shows (query, key) or (head, query, key); this has the shape {weights.shape}.",
            "Pick one sample and layer first, such as attention[0].",
        )
    if np.isnan(weights).any():
        raise DataError(
            f"{np.isnan(weights).sum()} of {weights.size} weights are NaN.",
            "Leave out padded queries, and queries that may look at no key.",
        )
    if weights.ndim == 2:
        return weights, None if head is None else f"head {head}"
    if head is None:
        return weights.mean(axis=0), f"mean of {len(weights)} heads"
    if not 0 <= head < len(weights):
        raise DimensionError(f"there is no head {head}.", f"Pick one of 0 to {len(weights) - 1}.")
    return weights[head], f"head {head}"


def _axis_texts(
    shape: tuple[int, ...],
    tokens: Sequence[str] | None,
    query_tokens: Sequence[str] | None,
    queries: list[str] | None,
    keys: list[str] | None,
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    if query_tokens is None and tokens is not None and len(tokens) == shape[0]:
        query_tokens = tokens
    of_query = queries if query_tokens is None else query_tokens
    of_key = keys if tokens is None else tokens
    for texts, length, what in ((of_query, shape[0], "queries"), (of_key, shape[1], "keys")):
        if texts is not None and len(texts) != length:
            raise DimensionError(
                f"there are {len(texts)} token texts for {length} {what}.",
                "Give tokens= one text for each key, and query_tokens= one for each query.",
            )
    return of_query, of_key


def _size(shape: tuple[int, ...]) -> tuple[float, float]:
    """Room for the labels without a figure that fills the wall."""
    height, width = (min(max(0.22 * length, 3.0), 9.0) for length in shape[-2:])
    return width + 2.2, height + 1.2
