"""Where patching brings the answer back: a map of layers and places, or of layers and heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import NOTHING, SEQUENTIAL, literal, new_axes, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = ("role", "position", "head", "kv_head")


def plot_patching(
    result: xr.Dataset,
    *,
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw the mean recovered share that `patch` returned: layers upwards, places or heads across.

    Colours run from 0 to 1 and clip there; grey is no value. Few cells have their number in them.

    Raises
    ------
    DimensionError  no `recovered_mean`, or more axes than two: choose one with isel or sel.
    """
    if "recovered_mean" not in result:
        raise DimensionError("This is no result of patching.", "Pass what `patch` returned.")
    values = result["recovered_mean"].squeeze(drop=True)
    across = [name for name in _ACROSS if name in values.dims]
    if set(values.dims) - {"layer", *across} or len(across) > 1:
        raise DimensionError(
            f"The shares lie along {', '.join(map(str, values.dims))}, which is more than a map shows.",
            "Choose one of the others: plot_patching(result.sel(role='last')).",
        )
    values = values.expand_dims([name for name in ("layer",) if name not in values.dims])
    axis = across[0] if across else "role"
    if not across:
        values = values.expand_dims(axis)
    shown = values.transpose("layer", axis).compute()
    layers, columns = shown.shape
    figure, ax = new_axes(
        ax, (max(3.6, min(12, 1.6 + 0.75 * columns)), max(2.6, min(8, 1.4 + 0.42 * layers)))
    )
    ax.set_facecolor(NOTHING)
    image = ax.imshow(
        np.ma.masked_invalid(shown.values), cmap=SEQUENTIAL, vmin=0, vmax=1, origin="lower", aspect="auto"
    )
    names = shown[axis].values if axis in shown.coords else np.array([str(result.attrs.get("sites", ""))])
    step = max(1, columns // 16)
    ax.set_xticks(range(0, columns, step), [literal(name).replace("_", " ") for name in names[::step]])
    if axis == "role":
        ax.tick_params(axis="x", rotation=30 if columns > 4 else 0)
    else:
        ax.set_xlabel({"kv_head": "key head"}.get(axis, axis))
    numbers = shown["layer"].values if "layer" in shown.coords else np.arange(layers)
    every = max(1, layers // 16)
    ax.set_yticks(range(0, layers, every), [str(number) for number in numbers[::every]])
    ax.set_ylabel("layer")
    if shown.size <= 80:
        _write(ax, shown)
    figure.colorbar(image, ax=ax, label=f"recovered share{_count(result)}", extend="both")
    ax.set_title(literal(title))
    save(figure, save_path)
    return figure, ax


def _count(result: xr.Dataset) -> str:
    """How many pairs the mean is over, where the result still has them."""
    return f" (n = {result.sizes['pair']} pairs)" if "pair" in result.sizes else ""


def _write(ax: Axes, shown: xr.DataArray) -> None:
    for (row, column), value in np.ndenumerate(shown.values):
        if np.isfinite(value):
            # No minus before a zero; dark on light, light on dark.
            text = f"{value:.2f}".replace("-0.00", "0.00")
            ax.text(column, row, text, ha="center", va="center", color="black" if value > 0.6 else "white")
