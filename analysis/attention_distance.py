"""How far each attention row looks: in tokens, and between image patches in steps of the patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.schema import KIND

from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .blocks import MAX_BYTES

_PATCH_COLUMNS = ("kind", "image_index", "tile", "patch_row", "patch_col")
_VARIABLES = {
    "attention_distance": {"units": "token", "long_name": "mean attended distance"},
    "attention_patch_distance": {"units": "patch", "long_name": "mean attended distance within the image"},
}


def attention_distance(
    run: xr.DataTree,
    *,
    stack: str = "text",
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Mean attended distance, D_i = sum_j p_ij |i - j|; between patches, that of their places in the grid.

    In a layer with attention sinks, p is what the keys get, divided by its sum.

    Parameters
    ----------
    stack, tokens, layer, sample, max_bytes
        Which rows: see `attention_statistics`.

    Returns
    -------
    attention_distance (layer, token, head), float32, tokens.
        NaN where a query may look at no key.
    attention_patch_distance (layer, token, head), float32, patches.
        sum_j p_ij d_ij / sum_j p_ij over the patches j of the query's own image and tile, d the Euclidean
        distance between cells of the grid. NaN for a query that is no image token.

    Raises
    ------
    MissingSiteError  the run lacks q or k.
    DataError         see `attention_statistics`.

    References
    ----------
    Dosovitskiy et al. (2021), An Image is Worth 16x16 Words, figure 7 (there in pixels).
    """
    return attention_statistics(
        run,
        [distance_statistic()],
        stack=stack,
        tokens=tokens,
        layer=layer,
        sample=sample,
        max_bytes=max_bytes,
    )


def distance_statistic() -> RowStatistic:
    """Both distances as statistics of a walk that computes several (`attention_statistics`)."""
    columns = ("position", *_PATCH_COLUMNS)
    return RowStatistic(_VARIABLES, _distances_of_rows, columns, columns)


def _distances_of_rows(rows: AttentionRows) -> NDArray[Any]:
    apart = np.abs(_differences(rows, "position"))
    in_tokens = np.einsum("hqk,qk->hq", rows.exponentials, apart) / rows.sums
    in_patches = np.full_like(in_tokens, np.nan)
    image = np.flatnonzero(rows.query["kind"] == KIND["image"])
    if image.size:
        in_patches[:, image] = _patch_distance(rows, image)
    return np.stack([in_tokens, in_patches], axis=-1)


def _patch_distance(rows: AttentionRows, image: NDArray[np.int64]) -> NDArray[Any]:
    same = np.broadcast_to(rows.key["kind"] == KIND["image"], (image.size, rows.scores.shape[-1])).copy()
    for name in ("image_index", "tile"):
        same &= _differences(rows, name)[image] == 0
    steps = np.hypot(_differences(rows, "patch_row")[image], _differences(rows, "patch_col")[image])
    weights = rows.exponentials[:, image]
    members = same.astype(np.float32)
    held = np.einsum("hqk,qk->hq", weights, members)
    with np.errstate(invalid="ignore"):
        distance = np.einsum("hqk,qk->hq", weights, steps * members) / held
    return np.where((held > 0) & ~np.isnan(rows.totals[:, image]), distance, np.nan)


def _differences(rows: AttentionRows, column: str) -> NDArray[np.float32]:
    """(query, key): by how much the key's column is larger."""
    query, key = (labels[column].astype(np.float32) for labels in (rows.query, rows.key))
    return np.asarray(key[None, :] - query[:, None])
