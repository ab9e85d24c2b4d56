"""Rows with known labels, and dissimilarity matrices made by hand: what their analyses are tested on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.spatial.distance import pdist, squareform

from mechanistic.analysis import rdm_graph, representation_rows
from mechanistic.analysis.rdm import representational_dissimilarity

METRICS = ("correlation", "euclidean", "mahalanobis", "crossnobis")
METHODS = ("spearman", "kendall", "cosine", "correlation", "whitened")

# Of the arrays of `repeated`: all rows of a layer may be held, or only the means of conditions.
HELD, UNHELD = 1 << 28, 800
BLOCKINGS = ("whole", "blocks", "unheld")


def blocking(kind: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`max_bytes` for one block, for blocks of four rows that tasks share, for such that each reads again."""
    if kind != "whole":
        monkeypatch.setattr(representation_rows, "MIN_BLOCK_ROWS", 1)
        monkeypatch.setattr(representation_rows, "BLOCK_ROWS", 4)
        monkeypatch.setattr(rdm_graph, "BLOCK_ROWS", 4)
    return UNHELD if kind == "unheld" else HELD


def rows(values: Any, chunk: int | None = None, **labels: Any) -> xr.DataArray:
    """An array (layer, row, feature) with labels on its rows, lazy in blocks of `chunk` rows."""
    array = xr.DataArray(
        values,
        {"layer": np.arange(len(values)) + 4, **{name: ("row", column) for name, column in labels.items()}},
        ("layer", "row", "feature"),
    )
    return array if chunk is None else array.chunk(layer=1, row=chunk)


def repeated(conditions: int = 6, repeats: int = 8, features: int = 5, seed: int = 3) -> xr.DataArray:
    """Conditions measured several times, half of them in each of two sessions, in mixed order."""
    rng = np.random.default_rng(seed)
    condition = np.repeat(np.arange(conditions), repeats)
    session = np.tile(np.arange(repeats) % 2, conditions)
    mixing = rng.normal(size=(features, features))
    values = rng.normal(size=(2, conditions, features))[:, condition]
    values = values + rng.normal(size=values.shape) @ mixing * 0.3
    order = rng.permutation(len(condition))
    return rows(
        values[:, order], word=np.array([f"c{number}" for number in condition])[order], session=session[order]
    )


def matrix(data: Any, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(representational_dissimilarity(data, **options)["dissimilarity"].values)


def random_matrices(count: int, conditions: int = 8, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return np.stack(
        [squareform(pdist(rng.normal(size=(conditions, 5)), "sqeuclidean")) for _ in range(count)]
    )


def rdms(values: Any, dim: str = "layer", **labels: Any) -> xr.Dataset:
    coords = {dim: np.arange(len(values)), "condition": np.arange(values.shape[1])}
    coords |= {name: ("condition", column) for name, column in labels.items()}
    return xr.Dataset({"dissimilarity": ((dim, "condition", "other"), values)}, coords)


def same_or_different(labels: Any) -> np.ndarray[Any, Any]:
    return (np.asarray(labels)[:, None] != np.asarray(labels)[None, :]).astype(float)


def pairs(matrix: Any) -> np.ndarray[Any, Any]:
    return np.asarray(matrix[np.triu_indices(len(matrix), 1)])
