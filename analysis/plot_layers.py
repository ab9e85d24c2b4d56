"""A quantity over layers, one line a split, with confidence intervals and the number of samples in each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import add_legend, colours, literal, new_axes, one_line, quantity, quiet, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICKS = 16


def plot_layers(
    summary: xr.Dataset,
    variable: str,
    *,
    by: str | None = None,
    label: str = "",
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw a variable of `summarize` over layers.

    Parameters
    ----------
    summary
        `variable`, and where there are intervals NAME_low and NAME_high, with the dimensions (layer) or
        (by, layer), in any order; `n_sample`, with () or (by), is told in the legend.
    by
        The split to draw as lines; the only other dimension if absent.
    label
        What the y axis shows; the variable's long name and units if absent.

    Raises
    ------
    DimensionError  the variable is missing, or has dimensions besides layer and `by`.
    """
    split = _split(summary, variable, by)
    names = [None] if split is None else summary[split].values.tolist()
    figure, ax = new_axes(ax)
    lines = {}
    for place, (name, colour) in enumerate(zip(names, colours(names), strict=True)):
        line = summary if split is None else summary.isel({split: place})
        layers = np.asarray(line["layer"].values)
        count = f"n = {int(line['n_sample']):,}" if "n_sample" in line else ""
        text = ", ".join(part for part in ("" if name is None else one_line(name), count) if part)
        (lines[text],) = ax.plot(layers, line[variable].values, color=colour, marker="o", markersize=4)
        if f"{variable}_low" in line:
            low, high = (np.asarray(line[f"{variable}_{end}"].values) for end in ("low", "high"))
            ax.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
    label_layers(ax, summary["layer"])
    ax.set_ylabel(literal(label or quantity(summary[variable])))
    ax.set_title(literal(title), fontsize=10)
    add_legend(ax, lines)
    quiet(ax)
    save(figure, save_path)
    return figure, ax


def label_layers(ax: Axes, layer: xr.DataArray) -> None:
    """Ticks at true layer numbers, never between them."""
    numbers: Any = np.sort(np.asarray(layer.values))
    ax.set_xticks(numbers[:: -(-len(numbers) // MAX_TICKS)])
    ax.set_xlabel("layer")


def _split(summary: xr.Dataset, variable: str, by: str | None) -> str | None:
    if variable not in summary.data_vars or "layer" not in summary[variable].dims:
        held = [str(name) for name, array in summary.data_vars.items() if "layer" in array.dims]
        raise DimensionError(
            f"there is no '{variable}' over layers; there are {', '.join(held) or 'none'}.",
            "Pass what summarize or an analysis returns, and the name of one of its variables.",
        )
    others = [str(dim) for dim in summary[variable].dims if dim != "layer"]
    if len(others) > 1 or (by is not None and others != [by]):
        raise DimensionError(
            f"'{variable}' has the dimensions {', '.join(map(str, summary[variable].dims))}.",
            "Leave layer and one split: average before summarising, .mean('head'), or select, .isel(...).",
        )
    return others[0] if others else None
