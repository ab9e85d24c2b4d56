"""Attention on things in the picture: the mass on an object's patches, and how well it finds the object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DimensionError, SpecificationError
from mechanistic.store.schema import KIND

from .allowed_keys import allowed_keys
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .blocks import MAX_BYTES, Columns

_EDGES = ("x0", "y0", "x1", "y1")
_PATCH_BOX = tuple(f"box_{edge}" for edge in _EDGES)


def attention_boxes(
    run: xr.DataTree,
    *,
    boxes: Sequence[str] = ("subject", "object"),
    overlap: float = 0.5,
    image: int = 0,
    stack: str = "text",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Attention mass on each box, M_b = sum of p_k over its patches k, and AUROC_b of attention against it.

    A patch belongs to a box when they share at least `overlap` of the smaller one's area, so that a box
    within one patch has a patch too. AUROC_b is the chance that a patch of the box gets more attention than
    a patch of the same image outside it, ties counting half.

    Parameters
    ----------
    boxes
        Names b whose columns b_x0, b_y0, b_x1, b_y1 in samples/ give a box in pixels of the original image.
    image
        The image of the sample that the boxes are in; patches of others count for neither.
    stack, tokens, layer, sample, max_bytes
        Which rows: see `attention_statistics`.

    Returns
    -------
    mass_b (layer, token, head), float32, share of the row.
    auroc_b (layer, token, head), float32, 0 to 1; 0.5 is chance.
        Of the patches that the query may look at; NaN where none of them is inside, or none outside.
    Both are NaN for a sample without such a box, and where a query may look at no key.

    Raises
    ------
    DimensionError      samples/ lacks a column of a box.
    SpecificationError  `overlap` is not above 0 and at most 1, or there are no boxes.
    MissingSiteError    the run lacks q or k.
    DataError           see `attention_statistics`.

    References
    ----------
    Fawcett (2006), Pattern Recognition Letters 27, 861.
    """
    statistic = box_statistic(sample_boxes(run, boxes), boxes, overlap=overlap, image=image)
    return attention_statistics(
        run, [statistic], stack=stack, tokens=tokens, layer=layer, sample=sample, max_bytes=max_bytes
    )


def sample_boxes(run: xr.DataTree, boxes: Sequence[str]) -> NDArray[np.float32]:
    """Boxes (sample, box, edge) from samples/, edges x0, y0, x1, y1; NaN where a sample has none.

    Raises
    ------
    DimensionError  samples/ lacks a column.
    """
    columns = [f"{name}_{edge}" for name in boxes for edge in _EDGES]
    samples = group(run, "samples")
    if missing := [name for name in columns if name not in samples.variables]:
        found = sorted(
            str(name).removesuffix("_x0") for name in samples.variables if str(name).endswith("_x0")
        )
        raise DimensionError(
            f"the samples have no {', '.join(missing)}; they have boxes of: {', '.join(found) or 'nothing'}.",
            "Boxes are dataset columns NAME_x0, NAME_y0, NAME_x1, NAME_y1: choose names with boxes=[...].",
        )
    table = samples[columns].compute()
    values = np.stack([table[name].values.astype(np.float32) for name in columns], axis=-1)
    values = values.reshape(len(values), len(boxes), 4)
    # Integer columns cannot hold NaN; what has no area, such as -1 throughout, is no box.
    real = (values[..., 2] > values[..., 0]) & (values[..., 3] > values[..., 1])
    return np.where(real[..., None], values, np.float32(np.nan))


def box_statistic(
    edges: NDArray[np.float32], boxes: Sequence[str], *, overlap: float = 0.5, image: int = 0
) -> RowStatistic:
    """Mass and AUROC of each box as statistics of a walk of several; `edges` come from `sample_boxes`."""
    if not 0 < overlap <= 1 or not boxes:
        raise SpecificationError(
            f"boxes are {', '.join(boxes) or 'none'}, with an overlap of {overlap}.",
            "Name a box, such as boxes=['subject'], and give a share of a patch, such as overlap=0.5.",
        )
    variables: dict[str, dict[str, Any]] = {}
    for name in boxes:
        variables[f"mass_{name}"] = {"units": "1", "long_name": f"attention mass on the {name}'s patches"}
        variables[f"auroc_{name}"] = {"units": "1", "long_name": f"AUROC of attention for the {name}'s box"}
    kernel = partial(_boxes_of_rows, edges=edges, overlap=overlap, image=image)
    return RowStatistic(variables, kernel, key_columns=("kind", "image_index", *_PATCH_BOX))


def patches_in_box(patches: Columns, box: NDArray[np.float32], *, overlap: float = 0.5) -> NDArray[np.bool_]:
    """Which patches share at least `overlap` of the smaller area with a box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = (patches[name] for name in _PATCH_BOX)
    wide = np.minimum(x1, box[2]) - np.maximum(x0, box[0])
    high = np.minimum(y1, box[3]) - np.maximum(y0, box[1])
    shared = np.maximum(wide, 0) * np.maximum(high, 0)
    smaller = np.minimum((x1 - x0) * (y1 - y0), (box[2] - box[0]) * (box[3] - box[1]))
    # Tokens without a patch have NaN here, which is in no box.
    return np.asarray(shared >= np.float32(overlap) * smaller)


def _boxes_of_rows(
    rows: AttentionRows, edges: NDArray[np.float32], overlap: float, image: int
) -> NDArray[Any]:
    result = np.full((*rows.totals.shape, 2 * edges.shape[1]), np.nan, np.float32)
    of_sample = edges[int(rows.key["sample_index"][0])]
    known = np.flatnonzero(np.isfinite(of_sample).all(axis=-1))
    if not known.size:
        return result
    shown = (rows.key["kind"] == KIND["image"]) & (rows.key["image_index"] == image)
    patches = {name: rows.key[name][shown] for name in _PATCH_BOX}
    allowed = allowed_keys(rows)[:, shown]
    weights, ranks = rows.exponentials[..., shown], _ranks(rows.scores[..., shown], allowed)
    for place in known:
        inside = patches_in_box(patches, of_sample[place], overlap=overlap)
        result[..., 2 * place] = (weights @ inside.astype(np.float32)) / rows.totals
        result[..., 2 * place + 1] = _auroc(ranks, inside, allowed)
    return result


def _ranks(scores: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ranks from 1 along the last axis, ties sharing their mean; keys that are not allowed come first.

    Sorting whole numbers made of score and place is five times as fast as sorting places by score.
    """
    from scipy.stats import rankdata

    # Less than nothing and nothing are one number, with two patterns of bits.
    bits = (scores + np.float32(0)).view(np.uint32)
    # Positive floats order like their bits, negative ones the other way round.
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    packed = np.where(allowed, ordered, 0).astype(np.uint64) << np.uint64(32)
    packed |= np.arange(scores.shape[-1], dtype=np.uint64)
    packed.sort(axis=-1)
    values, places = packed >> np.uint64(32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, places, np.arange(1.0, scores.shape[-1] + 1)[None, None], axis=-1)
    tied = ((values[..., 1:] == values[..., :-1]) & (values[..., 1:] > 0)).any(axis=-1)
    if tied.any():
        ranks[tied] = rankdata(scores[tied], axis=-1)
    return ranks


def _auroc(
    ranks: NDArray[np.float64], inside: NDArray[np.bool_], allowed: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Mann-Whitney U over pairs, among allowed keys; those not allowed hold the lowest ranks."""
    hits, others = allowed & inside, allowed & ~inside
    positive, negative = hits.sum(axis=-1), others.sum(axis=-1)
    below = (~allowed).sum(axis=-1)
    total = np.einsum("hqk,qk->hq", ranks, hits.astype(np.float64))
    wins = total - positive * below - positive * (positive + 1) / 2
    pairs = positive * negative
    return np.where(pairs > 0, wins / np.where(pairs > 0, pairs, 1), np.nan)
