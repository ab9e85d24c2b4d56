"""A dissimilarity matrix as a picture, sorted by a label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError

from .palette import SEQUENTIAL, literal, new_axes, one_line, quantity, save
from .splits import row_labels, split_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More cells than this cannot be told apart; blocks of conditions are then averaged.
MAX_CELLS = 1000
MAX_TICKS = 24


def plot_rdm(
    rdm: xr.Dataset,
    *,
    layer: int | None = None,
    by: str | None = None,
    label: str = "",
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw one matrix of `representational_dissimilarity` or `model_dissimilarity`, dark for alike.

    Parameters
    ----------
    layer
        Its true number; may be absent where there is one layer only.
    by
        A label of the conditions: they are sorted by it, and lines part its values.
    label
        What the colours show; the long name and units of the matrix if absent.

    Raises
    ------
    DimensionError  several matrices and no `layer`, no such layer, or no such label.
    """
    matrix = one_matrix(rdm, layer)
    figure, ax = new_axes(ax, (5.4, 4.6))
    names, order = None, np.arange(matrix.sizes["condition"])
    if by is not None:
        names = condition_labels(matrix, by)
        present = split_names(matrix[by], names)
        rank = {name: place for place, name in enumerate(present)}
        order = np.argsort([rank[name] for name in names.tolist()], kind="stable")
        matrix = matrix.isel(condition=order, other=order)
    count = matrix.sizes["condition"]
    step = -(-count // MAX_CELLS)
    if step > 1:
        matrix = matrix.coarsen(condition=step, other=step, boundary="pad").mean()
    extent = (-0.5, count - 0.5, count - 0.5, -0.5)
    image = ax.imshow(matrix.values, cmap=SEQUENTIAL, extent=extent, interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.set_label(literal(label or quantity(matrix, "dissimilarity")), fontsize=9)
    if names is not None:
        _mark_splits(ax, names[order])
    elif count <= MAX_TICKS and "condition" in matrix.coords:
        _mark_conditions(ax, row_labels(matrix["condition"]))
    what = "condition" if by is None else f"condition, by {literal(by)}"
    ax.set_xlabel(f"{what} (n = {count:,}{rows_behind(rdm)})")
    ax.set_ylabel(what)
    ax.set_title(literal(title or _title(matrix)), fontsize=10)
    save(figure, save_path)
    return figure, ax


def one_matrix(rdm: xr.Dataset, layer: int | None) -> xr.DataArray:
    """The matrix (condition, other) of a layer.

    Raises
    ------
    DimensionError  there is none, or there are several and `layer` does not choose one.
    """
    if "dissimilarity" not in rdm or rdm["dissimilarity"].dims[-2:] != ("condition", "other"):
        raise DimensionError(
            f"there is no dissimilarity (condition, other) in ({', '.join(map(str, rdm.data_vars))}).",
            "Pass what representational_dissimilarity returns.",
        )
    matrix = rdm["dissimilarity"]
    if layer is not None:
        held = rdm["layer"].values.tolist() if "layer" in matrix.dims else []
        if layer not in held:
            raise DimensionError(
                f"there is no layer {layer} here; the layers are {', '.join(map(str, held)) or 'none'}.",
                "Layers are named by their number in the model, counted from 0.",
            )
        matrix = matrix.sel(layer=layer)
    others = [dim for dim in matrix.dims[:-2] if matrix.sizes[dim] > 1]
    if others:
        raise DimensionError(
            f"there are {matrix.sizes[others[0]]} matrices, one a {others[0]}.",
            f"Choose one: layer=..., or rdm.isel({others[0]}=0).",
        )
    return matrix.isel(dict.fromkeys(matrix.dims[:-2], 0))


def rows_behind(rdm: xr.Dataset) -> str:
    """How many rows the conditions were averaged from, where that is more."""
    if "n_row" not in rdm or rdm["n_row"].dims != ("condition",):
        return ""
    rows = int(rdm["n_row"].sum())
    return f", of {rows:,} rows" if rows > rdm.sizes["condition"] else ""


def condition_labels(matrix: xr.DataArray, by: str) -> NDArray[Any]:
    """The values of a label of the conditions."""
    if by not in matrix.coords or matrix[by].dims != ("condition",):
        held = [str(name) for name, coord in matrix.coords.items() if coord.dims == ("condition",)]
        raise DimensionError(
            f"the conditions have no label '{by}'; they have {', '.join(held) or 'none'}.",
            f"Attach a column of the samples first: with_samples(rdm, run, '{by}').",
        )
    return row_labels(matrix[by])


def _mark_splits(ax: Axes, names: NDArray[Any]) -> None:
    """A line where the label changes, and its value in the middle of each stretch."""
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    stops = np.append(starts[1:], len(names))
    if len(starts) <= MAX_TICKS:
        for edge in starts[1:] - 0.5:
            ax.axhline(edge, color="white", linewidth=0.8)
            ax.axvline(edge, color="white", linewidth=0.8)
        middles = (starts + stops - 1) / 2
        texts = [one_line(names[start]) for start in starts]
        ax.set_xticks(middles, texts, rotation=45, ha="right", fontsize=8)
        ax.set_yticks(middles, texts, fontsize=8)
        ax.tick_params(length=0)


def _mark_conditions(ax: Axes, names: NDArray[Any]) -> None:
    texts = [one_line(name) for name in names]
    ax.set_xticks(np.arange(len(texts)), texts, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(np.arange(len(texts)), texts, fontsize=8)


def _title(matrix: xr.DataArray) -> str:
    named = [str(name) for name in ("layer", "head", "model") if name in matrix.coords]
    return ", ".join(f"{name} {matrix[name].item()}" for name in named)
