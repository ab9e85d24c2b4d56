"""Accuracy of probes over layers, with the chance level and the shuffled-label control beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import GREY, add_legend, colours, literal, new_axes, quiet, save
from .plot_layers import label_layers

if TYPE_CHECKING:
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
    for (name, probe), colour in zip(named.items(), colours(list(named)), strict=True):
        _draw(ax, literal(name), probe, colour)
    for level in sorted({round(float(probe["chance"]), 6) for probe in named.values()}):
        ax.axhline(level, color=GREY, ls=":", lw=1.2, label=f"most frequent class, {level:.0%}")
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("held-out accuracy of the probe (share)")
    ax.set_title(literal(title), fontsize=10)
    label_layers(
        ax, xr.concat([probe["layer"] for probe in named.values()], "layer").drop_duplicates("layer")
    )
    ax.plot([], [], color=GREY, ls="--", lw=1.2, label="labels shuffled")
    add_legend(ax, loc="center left", bbox_to_anchor=(1.01, 0.5))
    quiet(ax)
    save(figure, save_path)
    return figure, ax


def _draw(ax: Axes, name: str, probe: xr.Dataset, colour: str) -> None:
    def values(variable: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.asarray(probe[variable].values, np.float64)

    layers = np.asarray(probe["layer"].values)
    text = ", ".join(part for part in (name, f"n = {int(probe['n_sample']):,}") if part)
    ax.plot(layers, values("accuracy"), color=colour, marker="o", markersize=4, label=text)
    ax.fill_between(
        layers, values("accuracy_low"), values("accuracy_high"), color=colour, alpha=0.2, linewidth=0
    )
    ax.plot(layers, values("shuffled_accuracy"), color=colour, ls="--", lw=1.2)
    ax.fill_between(
        layers,
        values("shuffled_accuracy_low"),
        values("shuffled_accuracy_high"),
        color=colour,
        alpha=0.1,
        linewidth=0,
    )
