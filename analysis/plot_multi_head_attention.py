"""The attention patterns of several heads side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .attention_weights import pattern_of, plain_array
from .palette import NOTHING, SEQUENTIAL, literal, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS = 24
COLUMNS = 4


def plot_multi_head_attention(
    attention: Any,
    *,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    layer_name: str | None = None,
    vmax: float | None = None,
    ax: Sequence[Axes] | NDArray[Any] | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Draw a panel a head on one scale, coloured by the square root of the weights; grey where they are 0.

    Parameters
    ----------
    attention (head, query, key)
        Weights: an array, a tensor, a DataArray, or a Dataset with attention_pattern, whose token texts and
        head numbers then label the panels.
    tokens
        Texts of the keys, and of the queries where there are as many; `query_tokens` where they differ. Axes
        of more than 24 have no room for them and show positions.
    heads
        Which to draw, by their number, or by place where the weights have no numbers; None means all.
    layer_name
        The title of the figure.
    vmax
        The weight of the brightest colour; the largest weight drawn by default.
    ax
        Axes to draw on, one a head; the array of axes comes back.

    Raises
    ------
    DimensionError  not three dimensions, no such head, or as many texts or axes as do not fit.
    DataError       NaN.
    """
    from matplotlib.colors import PowerNorm

    weights, numbers, texts = _panels(attention)
    chosen = _chosen(numbers, heads)
    shown = weights[[numbers.index(head) for head in chosen]]
    labels = _texts(shown.shape[1:], tokens, query_tokens, texts)
    figure, axes = panel_axes(len(chosen), ax, width=2.5, height=2.3)
    scale = PowerNorm(0.5, vmin=0, vmax=float(shown.max()) if vmax is None else vmax)
    for place, (panel, head) in enumerate(zip(axes, chosen, strict=True)):
        panel.set_facecolor(NOTHING)
        seen = np.ma.masked_equal(shown[place], 0)
        drawn = panel.imshow(seen, cmap=SEQUENTIAL, norm=scale, aspect="auto", interpolation="nearest")
        panel.set_title(f"head {head}", fontsize=9)
        _label(panel.yaxis, "query", labels[0])
        _label(panel.xaxis, "key", labels[1], rotation=90)
    bar = figure.colorbar(drawn, ax=list(axes))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("attention weight (share of the row)", fontsize=8)
    if layer_name is not None and ax is None:
        figure.suptitle(literal(layer_name), fontsize=11)
    save(figure, save_path)
    return figure, axes


def panel_axes(
    count: int, ax: Any, *, width: float, height: float, columns: int = COLUMNS
) -> tuple[Figure, NDArray[Any]]:
    """`count` axes in rows on a new figure, or those given.

    Raises
    ------
    DimensionError  another number of axes is given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if ax is not None:
        axes = np.ravel(np.asarray(ax, object))
        if len(axes) != count:
            raise DimensionError(
                f"there are {count} panels, but {len(axes)} axes.",
                "Give one axes a panel: figure.subplots(rows, columns).ravel().",
            )
        return axes[0].get_figure(root=True), axes
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across + 1.2, height * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.ravel(figure.subplots(down, across, squeeze=False))
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _panels(attention: Any) -> tuple[NDArray[Any], list[int], tuple[list[str] | None, list[str] | None]]:
    """The weights, the numbers of their heads, and the texts of queries and keys."""
    texts: list[list[str] | None] = [None, None]
    numbers = None
    if isinstance(attention, xr.Dataset):
        attention = pattern_of(attention)
    if isinstance(attention, xr.DataArray):
        attention = attention.squeeze([dim for dim in ("layer",) if attention.sizes.get(dim) == 1])
        if {"head", "query", "key"} == set(attention.dims):
            attention = attention.transpose("head", "query", "key")
            numbers = [int(head) for head in attention["head"].values] if "head" in attention.coords else None
        for place, role in enumerate(("query", "key")):
            if f"{role}_token_text" in attention.coords:
                texts[place] = [str(text) for text in np.atleast_1d(attention[f"{role}_token_text"].values)]
    weights = plain_array(attention).astype(np.float64)
    if weights.ndim != 3 or not weights.size:
        raise DimensionError(
            f"several heads are drawn from (head, query, key); this has the shape {weights.shape}.",
            "Pick one sample and layer first, such as attention[0]; for one head use plot_attention_heatmap.",
        )
    if np.isnan(weights).any():
        raise DataError(
            f"{np.isnan(weights).sum()} of {weights.size} weights are NaN.",
            "Leave out padded queries, and queries that may look at no key.",
        )
    return weights, list(range(len(weights))) if numbers is None else numbers, (texts[0], texts[1])


def _chosen(numbers: list[int], heads: Sequence[int] | None) -> list[int]:
    if heads is None:
        return numbers
    if not len(heads) or (missing := [head for head in heads if head not in numbers]):
        raise DimensionError(
            f"there is no head {', '.join(map(str, missing if len(heads) else heads))} here.",
            f"Choose of {', '.join(map(str, numbers))}.",
        )
    return list(heads)


def _texts(
    shape: tuple[int, ...],
    tokens: Sequence[str] | None,
    query_tokens: Sequence[str] | None,
    own: tuple[list[str] | None, list[str] | None],
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    if query_tokens is None and tokens is not None and len(tokens) == shape[0]:
        query_tokens = tokens
    chosen = (query_tokens or own[0], tokens or own[1])
    for texts, length, what in zip(chosen, shape, ("queries", "keys"), strict=True):
        if texts is not None and len(texts) != length:
            raise DimensionError(
                f"there are {len(texts)} token texts for {length} {what}.",
                "Give tokens= one text for each key, and query_tokens= one for each query.",
            )
    return chosen


def _label(axis: Any, role: str, texts: Sequence[str] | None, **style: Any) -> None:
    axis.set_tick_params(labelsize=7)
    if texts is None or len(texts) > MAX_LABELS:
        axis.set_label_text(f"{role} (position)", fontsize=8)
        return
    axis.set_ticks(range(len(texts)), [literal(text) for text in texts], fontsize=7, **style)
    axis.set_label_text(f"{role} token", fontsize=8)
