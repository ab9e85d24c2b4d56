"""A quantity of every attention head: a row a layer, a column a head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .palette import NOTHING, SEQUENTIAL, literal, new_axes, quantity, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICKS = 24
MAX_WRITTEN = 64
# Blue below, red above, white between; both ends are told apart by colour-blind readers.
DIVERGING = "RdBu_r"


def plot_head_map(
    values: Any,
    *,
    label: str = "",
    title: str = "",
    n: int | None = None,
    centre: float | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw values (layer, head) as a map, the lowest layer at the bottom; numbers are written in small maps.

    Parameters
    ----------
    values
        A DataArray (layer, head), whose numbers label the axes, or a plain array. Average or choose other
        dimensions first. NaN is drawn grey.
    label
        What the colour shows; the long name and units by default.
    n
        How many samples each value stands for, told in the title.
    centre
        The value of no effect, such as 0 for logits or 0.5 for AUROC: colours then run from blue below it to
        red above it, equally far to both sides. None uses one hue, from the smallest value to the largest.

    Raises
    ------
    DimensionError  other dimensions than layer and head.
    DataError       nothing but NaN.
    """
    table, layers, heads, own = _table(values)
    low, high = _range(table, centre, vmin, vmax)
    figure, ax = new_axes(ax, (min(1.8 + 0.55 * len(heads), 9.0), min(1.4 + 0.45 * len(layers), 9.0)))
    ax.set_facecolor(NOTHING)
    cmap = SEQUENTIAL if centre is None else DIVERGING
    shown = np.ma.masked_invalid(table)
    drawn = ax.imshow(
        shown, cmap=cmap, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="nearest"
    )
    figure.colorbar(drawn, ax=ax, label=literal(label or own))
    if table.size <= MAX_WRITTEN:
        _write(ax, table, drawn)
    for axis, name, numbers in ((ax.yaxis, "layer", layers), (ax.xaxis, "head", heads)):
        step = -(-len(numbers) // MAX_TICKS)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
        axis.set_label_text(name)
    count = f"n = {n:,}" if n else ""
    ax.set_title(", ".join(part for part in (literal(title), count) if part), fontsize=10)
    save(figure, save_path)
    return figure, ax


def _table(values: Any) -> tuple[NDArray[np.float64], list[int], list[int], str]:
    own = ""
    if isinstance(values, xr.DataArray):
        if set(values.dims) != {"layer", "head"}:
            raise DimensionError(
                f"a head map shows (layer, head); these data have ({', '.join(map(str, values.dims))}).",
                "Average or choose the others: values.mean('sample'), values.sel(criterion='box_auroc').",
            )
        values = values.transpose("layer", "head")
        own = quantity(values)
        numbers = [[int(number) for number in values[dim].values] for dim in ("layer", "head")]
        table = np.asarray(values.values, np.float64)
    else:
        table = np.asarray(values, np.float64)
        if table.ndim != 2:
            raise DimensionError(
                f"a head map shows (layer, head); this array has the shape {table.shape}.",
                "Average over samples and tokens first.",
            )
        numbers = [list(range(size)) for size in table.shape]
    if not np.isfinite(table).any():
        raise DataError(
            "no head has a value to draw: all are NaN or infinite.",
            "Choose another quantity or other layers.",
        )
    return table, numbers[0], numbers[1], own


def _range(
    table: NDArray[np.float64], centre: float | None, vmin: float | None, vmax: float | None
) -> tuple[float, float]:
    known = table[np.isfinite(table)]
    low = float(known.min()) if vmin is None else vmin
    high = float(known.max()) if vmax is None else vmax
    if centre is None:
        return low, high
    reach = max(abs(low - centre), abs(high - centre)) or 1.0
    return centre - reach, centre + reach


def _write(ax: Axes, table: NDArray[np.float64], drawn: Any) -> None:
    """The numbers, dark on light cells and light on dark ones."""
    digits = 2 if np.nanmax(np.abs(table)) < 10 else 1 if np.nanmax(np.abs(table)) < 100 else 0
    for (layer, head), value in np.ndenumerate(table):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        ax.text(
            head,
            layer,
            # Adding 0 turns a rounded -0.00 into 0.00.
            f"{round(value, digits) + 0.0:.{digits}f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if light else "white",
        )
