"""Accuracy of probes over layers, with the chance level and the shuffled-label control beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import GREY, add_legend, colours, literal, new_axes, one_line, quiet, save
from .plot_layers import label_layers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_probe(
    probes: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw what `linear_probe` returned, one line for each named probe.

    Solid: cross-validated accuracy with its interval. Dashed, in the same colour: shuffled labels, with the
    range of their repetitions. Dotted: the share of the most frequent class.

    Raises
    ------
    DimensionError  there is no probe to draw.
    """
    named = {"": probes} if isinstance(probes, xr.Dataset) else dict(probes)
    if not named or any("accuracy" not in probe for probe in named.values()):
        raise DimensionError(
            "there is no probe to draw.", "Pass what linear_probe returns, or a dict of such results by name."
        )
    figure, ax = new_axes(ax, (7.4, 3.8))
    lines: dict[str, Artist] = {}
    for (name, probe), colour in zip(named.items(), colours(list(named)), strict=True):
        text = ", ".join(part for part in (one_line(name), f"n = {int(probe['n_sample']):,}") if part)
        lines[text] = _line(ax, probe, "accuracy", colour, marker="o", markersize=4)
        _line(ax, probe, "shuffled_accuracy", colour, linestyle="--", linewidth=1.2)
    for level in sorted({round(float(probe["chance"]), 6) for probe in named.values()}):
        lines[f"most frequent class, {level:.0%}"] = ax.axhline(level, color=GREY, ls=":", lw=1.2)
    (lines["labels shuffled"],) = ax.plot([], [], color=GREY, ls="--", lw=1.2)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("held-out accuracy of the probe (share)")
    ax.set_title(literal(title), fontsize=10)
    every = [probe["layer"] for probe in named.values()]
    label_layers(ax, xr.concat(every, "layer").drop_duplicates("layer"))
    add_legend(ax, lines, loc="center left", bbox_to_anchor=(1.01, 0.5))
    quiet(ax)
    save(figure, save_path)
    return figure, ax


def _line(ax: Axes, probe: xr.Dataset, variable: str, colour: str, **style: Any) -> Artist:
    """One line with its interval."""
    middle, low, high = (np.asarray(probe[f"{variable}{end}"].values) for end in ("", "_low", "_high"))
    layers = np.asarray(probe["layer"].values)
    (line,) = ax.plot(layers, middle, color=colour, **style)
    ax.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    return line
