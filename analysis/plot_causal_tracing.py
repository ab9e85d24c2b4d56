"""Where restoring a state brings the answer back: a row a place, a column a layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mechanistic.store.errors import DataError, DimensionError

from .palette import NOTHING, SEQUENTIAL, literal, new_axes, save
from .plot_head_map import MAX_TICKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_causal_tracing(
    result: xr.Dataset,
    *,
    site: str = "resid_post",
    variable: str = "recovered",
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw what `causal_tracing` returned for one site as a map of places and layers, the first place on top.

    Parameters
    ----------
    variable
        ``"recovered"`` or ``"average_indirect_effect"``.

    Raises
    ------
    DimensionError  no such site or variable.
    DataError       nothing but NaN.
    """
    if variable not in result or set(result[variable].dims) != {"site", "layer", "place"}:
        raise DimensionError(
            f"there is no '{variable}' by site, layer and place.",
            "Pass what causal_tracing returned, and variable='recovered' or 'average_indirect_effect'.",
        )
    if site not in result["site"].values:
        raise DimensionError(
            f"site '{site}' was not traced; there are {', '.join(map(str, result['site'].values))}.",
            "Trace it: causal_tracing(..., sites=[...]).",
        )
    values = result[variable].sel(site=site).transpose("place", "layer")
    table = np.asarray(values.values, np.float64)
    if not np.isfinite(table).any():
        raise DataError("there is no value to draw: all are NaN.", "The corruption has no effect.")
    layers = [str(number) for number in result["layer"].values]
    places = [literal(name) for name in result["place"].values]
    size = (min(2.4 + 0.4 * len(layers), 9.0), min(1.2 + 0.32 * len(places), 9.0))
    figure, ax = new_axes(ax, size)
    ax.set_facecolor(NOTHING)
    high = 1.0 if variable == "recovered" else None
    drawn = ax.imshow(
        np.ma.masked_invalid(table),
        cmap=SEQUENTIAL,
        vmin=0.0,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(drawn, ax=ax, label=literal(values.attrs.get("long_name", variable)))
    step = -(-len(layers) // MAX_TICKS)
    ax.set_xticks(range(0, len(layers), step), layers[::step])
    ax.set_yticks(range(len(places)), places)
    ax.set_xlabel("layer")
    spoiled = result.attrs.get("corrupt", "")
    ax.set_title(literal(title or f"{site} restored, {spoiled} corrupted"), fontsize=10)
    save(figure, save_path)
    return figure, ax
