"""Scores of probes over layers, or over layers and heads, with chance and the controls beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import GREY, add_legend, colours, literal, new_axes, one_line, quiet, save
from .plot_head_map import plot_head_map
from .plot_layers import label_layers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "accuracy": "held-out accuracy of the probe (share)",
    "r2": "held-out $R^2$ of the probe",
    "selectivity": "selectivity: score less that of the control task",
}
_SHORT = {"accuracy": "held-out accuracy", "r2": "held-out R^2"}
# Each control, how it is drawn, and what the legend calls it.
_CONTROLS = {"shuffled": ("--", "labels shuffled"), "control": ("-.", "control task")}


def plot_probe(
    probes: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    variable: str | None = None,
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw what `linear_probe` or `apply_probe` returned: a line for each named probe and each target.

    Solid: held-out accuracy or R^2 with its interval. In the same colour dashed: shuffled labels, with the
    range of their repetitions; dash-dotted: the control task, where there is one. Dotted: the share of the
    most frequent class, or the R^2 of the mean, 0. A probe of heads is drawn as a map (layer, head) instead.

    Parameters
    ----------
    variable
        ``"accuracy"``, ``"r2"`` or ``"selectivity"``; the score that the probe has by default.

    Raises
    ------
    DimensionError  there is no probe to draw, or none with that variable; several probes of heads at once.
    """
    named = {"": probes} if isinstance(probes, xr.Dataset) else dict(probes)
    shown = variable or _score(named)
    lines = {text: probe for name, probe in named.items() for text, probe in _targets(name, probe)}
    if any(shown not in probe for probe in lines.values()) or not lines:
        raise DimensionError(
            f"there is no probe to draw with {shown}.",
            "Pass what linear_probe returns, or a dict of such results by name; selectivity needs control=.",
        )
    if any(probe[shown].ndim > 1 for probe in lines.values()):
        return _heads(lines, shown, title, ax, save_path)
    figure, ax = new_axes(ax, (7.4, 3.8))
    _draw(ax, lines, shown)
    ax.set_ylabel(_LABELS.get(shown, shown))
    ax.set_title(literal(title), fontsize=10)
    numbers = np.unique(np.concatenate([probe["layer"].values for probe in lines.values()]))
    label_layers(ax, xr.DataArray(numbers, dims="layer"))
    quiet(ax)
    save(figure, save_path)
    return figure, ax


def _score(named: Mapping[str, xr.Dataset]) -> str:
    return "r2" if named and all("r2" in probe for probe in named.values()) else "accuracy"


def _targets(name: str, probe: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """A probe of several targets as one for each, with what the legend calls it."""
    if "target" not in probe.dims:
        return [(name, probe)]
    numbers = probe["target"].values.tolist() if "target" in probe.coords else range(probe.sizes["target"])
    return [(f"{name} {number}".strip(), probe.isel(target=place)) for place, number in enumerate(numbers)]


def _draw(ax: Axes, lines: Mapping[str, xr.Dataset], shown: str) -> None:
    legend: dict[str, Artist] = {}
    controls: dict[str, Artist] = {}
    for (name, probe), colour in zip(lines.items(), colours(list(lines)), strict=True):
        text = ", ".join(part for part in (one_line(name), f"n = {int(probe['n_sample']):,}") if part)
        legend[text] = _line(ax, probe, shown, colour, marker="o", markersize=4)
        for control, (style, meaning) in _CONTROLS.items():
            if f"{control}_{shown}" in probe:
                _line(ax, probe, f"{control}_{shown}", colour, linestyle=style, linewidth=1.2)
                (controls[meaning],) = ax.plot([], [], color=GREY, ls=style, lw=1.2)
    levels = {round(float(probe["chance"]), 6) for probe in lines.values() if "chance" in probe}
    for level in sorted(levels) if shown == "accuracy" else ():
        legend[f"most frequent class, {level:.0%}"] = ax.axhline(level, color=GREY, ls=":", lw=1.2)
    if shown != "accuracy":
        meaning = "mean of the target" if shown == "r2" else "no better than the control"
        legend[meaning] = ax.axhline(0, color=GREY, ls=":", lw=1.2)
    # Far below 0 there is nothing to read: an R^2 of -3 is as useless as one of -0.3.
    lowest = min(0.0, *(float(probe[shown].min()) for probe in lines.values()))
    ax.set_ylim(max(lowest - 0.1, -1.0) if shown != "accuracy" else 0, 1.02)
    add_legend(ax, legend | controls, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _heads(
    lines: Mapping[str, xr.Dataset], shown: str, title: str, ax: Axes | None, path: str | Path | None
) -> tuple[Figure, Axes]:
    if len(lines) > 1:
        raise DimensionError(
            f"these are {len(lines)} maps of layers and heads: {', '.join(lines)}.",
            "Draw one at a time, each on axes of its own: ax=, or choose one: .isel(target=0), .sel(head=3).",
        )
    ((name, probe),) = lines.items()
    centre = float(probe["chance"]) if shown == "accuracy" and "chance" in probe else 0.0
    return plot_head_map(
        probe[shown],
        label=_SHORT.get(shown, shown),
        title=title or name,
        n=int(probe["n_sample"]),
        centre=centre,
        ax=ax,
        save_path=path,
    )


def _line(ax: Axes, probe: xr.Dataset, variable: str, colour: str, **style: Any) -> Artist:
    """One line, with its interval where it has one."""
    layers = np.asarray(probe["layer"].values)
    (line,) = ax.plot(layers, probe[variable].values, color=colour, **style)
    if f"{variable}_low" in probe:
        low, high = (np.asarray(probe[f"{variable}_{end}"].values) for end in ("low", "high"))
        ax.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    return line
