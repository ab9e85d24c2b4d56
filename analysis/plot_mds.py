"""Conditions as points in the plane, as far apart as their dissimilarities say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .palette import add_legend, colours, literal, new_axes, one_line, quiet, save
from .plot_rdm import condition_labels, one_matrix, rows_behind
from .splits import row_labels, split_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_NAMES = 24


def classical_mds(matrix: NDArray[Any], *, dimensions: int = 2) -> tuple[Floats, Floats]:
    """Points whose squared distances come closest to a matrix (condition, condition) of squared distances.

    Eigenvectors of -J D J / 2, with J the centring matrix, times the roots of their eigenvalues. All metrics
    of `representational_dissimilarity` are squared distances: 1 - r is half that of patterns of length 1.

    Returns
    -------
    points (condition, dimension), float64, roots of the units of the matrix.
    share (dimension), float64: of the sum of positive eigenvalues.

    Raises
    ------
    DataError  fewer conditions than dimensions + 1, a value that is not finite, or no positive eigenvalue.

    References
    ----------
    Torgerson (1952), Psychometrika 17, 401.
    """
    values = np.asarray(matrix, np.float64)
    if len(values) <= dimensions or not np.isfinite(values).all():
        raise DataError(
            f"{len(values)} conditions with {(~np.isfinite(values)).sum()} values that are not finite "
            f"cannot be placed in {dimensions} dimensions.",
            "Use more conditions, and leave out those without a dissimilarity.",
        )
    means = values.mean(axis=0)
    found, vectors = np.linalg.eigh(-0.5 * (values - means[:, None] - means[None, :] + means.mean()))
    largest = found[::-1][:dimensions]
    if largest[0] <= 0:
        raise DataError("all conditions are alike: there is nothing to place.", "Choose another layer.")
    points = vectors[:, ::-1][:, :dimensions] * np.sqrt(np.maximum(largest, 0))
    # Which way round a vector comes out is an accident of the solver.
    signs = np.sign(np.take_along_axis(points, np.abs(points).argmax(axis=0)[None, :], axis=0))
    return points * np.where(signs == 0, 1, signs), np.maximum(largest, 0) / found[found > 0].sum()


def plot_mds(
    rdm: xr.Dataset,
    *,
    layer: int | None = None,
    by: str | None = None,
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw the conditions of one matrix of `representational_dissimilarity` by classical scaling.

    Parameters
    ----------
    layer
        Its true number; may be absent where there is one layer only.
    by
        A label of the conditions, shown by colour and shape. Without it, few conditions carry their names.

    Raises
    ------
    DimensionError  several matrices and no `layer`, no such layer, or no such label.
    DataError       see `classical_mds`.
    """
    matrix = one_matrix(rdm, layer)
    points, share = classical_mds(matrix.values)
    figure, ax = new_axes(ax, (5.2, 4.4))
    names = None if by is None else condition_labels(matrix, by)
    splits = [None] if by is None or names is None else split_names(matrix[by], names)
    drawn = {}
    for place, (split, colour) in enumerate(zip(splits, colours(splits), strict=True)):
        x, y = points.T if names is None else points[names == split].T
        text = "" if split is None else f"{one_line(split)}, n = {len(x):,}"
        marker = MARKERS[place % len(MARKERS)]
        drawn[text] = ax.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.8, linewidths=0)
    if by is None and len(points) <= MAX_NAMES and "condition" in matrix.coords:
        for point, name in zip(points, row_labels(matrix["condition"]), strict=True):
            ax.annotate(one_line(name), point, xytext=(4, 3), textcoords="offset points", fontsize=8)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel(f"first dimension ({share[0]:.0%} of the squared distance)")
    ax.set_ylabel(f"second dimension ({share[1]:.0%})")
    layers = f"layer {matrix['layer'].item()}, " if "layer" in matrix.coords else ""
    ax.set_title(literal(title or f"{layers}n = {len(points):,} conditions{rows_behind(rdm)}"), fontsize=10)
    add_legend(ax, drawn)
    quiet(ax)
    save(figure, save_path)
    return figure, ax
