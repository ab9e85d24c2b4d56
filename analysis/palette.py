"""House style of figures: colours that colour-blind readers tell apart, no display, texts as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechanistic.store.errors import DimensionError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), Color Universal Design: https://jfly.uni-koeln.de/color/
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#777777"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)

# Splits that occur everywhere keep their colour in every figure.
OF_SPLIT = {"correct": BLUE, "incorrect": VERMILLION, "unscored": GREY}

# Even steps of lightness, dark for nothing: also read in grey, and over a photograph.
SEQUENTIAL = "viridis"
NOTHING = "#e4e4e4"

_BREAKS = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def colours(names: Sequence[object]) -> list[str]:
    """A colour for each split: its own if it has one, else the next of the cycle that is free."""
    taken = {OF_SPLIT[str(name)] for name in names if str(name) in OF_SPLIT}
    free = [colour for colour in CYCLE if colour not in taken] or list(CYCLE)
    chosen, used = [], 0
    for name in names:
        own = OF_SPLIT.get(str(name))
        chosen.append(own or free[used % len(free)])
        used += own is None
    return chosen


def literal(text: object) -> str:
    """A text that matplotlib shows as it is: dollars are no mathematics."""
    return str(text).replace("$", r"\$")


def one_line(text: object) -> str:
    """A token as a label: literal, its line breaks and tabs written out."""
    shown = literal(text)
    for character, written in _BREAKS.items():
        shown = shown.replace(character, written)
    return shown


def quantity(variable: xr.DataArray, name: str = "") -> str:
    """What a variable shows, with its unit unless it is a pure number; `name` where it has no long name."""
    what = str(variable.attrs.get("long_name", name or str(variable.name or "").replace("_", " ")))
    units = str(variable.attrs.get("units", "1"))
    return what if units in ("", "1", "(1)^2") else f"{what} ({units})"


def new_axes(ax: Axes | None, size: tuple[float, float] = (5.4, 3.6)) -> tuple[Figure, Axes]:
    """The axes given, or new ones on a figure that needs neither a display nor pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()
    owner = ax.figure
    while not isinstance(owner, Figure):
        if owner is None:
            raise DimensionError("these axes belong to no figure.", "Make them with figure.add_subplot().")
        owner = owner.figure
    return owner, ax


def quiet(ax: Axes) -> None:
    """Only the two edges that are read."""
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(ax: Axes, lines: Mapping[str, Artist], **style: Any) -> None:
    """A legend of these lines; told which, since matplotlib leaves out labels that begin with "_"."""
    named = {text: line for text, line in lines.items() if text}
    if named:
        ax.legend(list(named.values()), list(named), frameon=False, fontsize=9, **style)


def save(figure: Figure, path: str | Path | None) -> None:
    """Write the figure where asked, making the folder; large enough for all of its words."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
