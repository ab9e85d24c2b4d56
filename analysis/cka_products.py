"""What CKA needs of two layers, summed over blocks of rows: |X'Y|^2 in Frobenius norm, and the rows' lengths.

|X'Y|^2 = sum_ij K_ij L_ij with the Gram matrices K = XX' and L = YY'. For centred rows the sums of K and L
over rows vanish, so that their diagonals, the squared lengths, are all the unbiased estimator needs besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .representation_rows import finite_rows

Floats = NDArray[np.float64]

# Gram tiles of all layers are multiplied with each other in double precision, so many elements at a time.
_PIECE = 1 << 16


@dataclass(frozen=True)
class LayerSummary:
    """Mean (feature,) of a layer's rows, and the squared length (row,) of each row less it."""

    mean: Floats
    lengths: Floats


def summarize_layer(
    blocks: Sequence[Any], starts: Sequence[int], samples: NDArray[np.int64], number: int
) -> LayerSummary:
    """Describe a layer from its blocks, in two passes.

    Raises
    ------
    DataError  a value is not finite, or all rows are the same.
    """
    total, count = 0.0, len(samples)
    for start, block in zip(starts, blocks, strict=False):
        rows = finite_rows(block, samples[start:], number)
        total = total + rows.sum(axis=0, dtype=np.float64)
    mean = np.asarray(total) / count
    lengths = []
    for start, block in zip(starts, blocks, strict=False):
        rows = finite_rows(block, samples[start:], number) - mean
        lengths.append(np.einsum("nf,nf->n", rows, rows))
    summary = LayerSummary(mean, np.concatenate(lengths))
    if summary.lengths.max() <= 1e-24 * float(mean @ mean):
        raise DataError(
            f"all rows of layer {number} are the same: they align with nothing.",
            "Leave the layer out (layer=...), or choose tokens that differ between samples.",
        )
    return summary


def gram_tile(
    firsts: Sequence[Any], seconds: Sequence[Any] | None, summaries: Sequence[LayerSummary]
) -> Floats:
    """Sums (layer, layer) of K_ij L_ij over a tile of rows i with rows j; `seconds` is None on the diagonal.

    Both hold one block for each layer; a tile off the diagonal counts for its mirror image too.
    """
    grams = []
    for place, summary in enumerate(summaries):
        left = _centred(firsts[place], summary)
        right = left if seconds is None else _centred(seconds[place], summary)
        grams.append((left @ right.T).ravel())
    stacked = np.stack(grams)
    total = np.zeros((len(grams), len(grams)))
    for start in range(0, stacked.shape[1], _PIECE):
        piece = stacked[:, start : start + _PIECE].astype(np.float64)
        total += piece @ piece.T
    return total if seconds is None else 2 * total


def covariance_product(
    lefts: Sequence[Any], rights: Sequence[Any] | None, left: LayerSummary, right: LayerSummary
) -> float:
    """|X'Y|^2 of two layers, from their blocks; `rights` is None for a layer with itself."""
    products: Any = 0
    for place, block in enumerate(lefts):
        x = _centred(block, left)
        y = x if rights is None else _centred(rights[place], right)
        products = products + x.T @ y
    return float(np.einsum("xy,xy->", products, products, dtype=np.float64))


def alignment(
    products: Floats, summaries: Sequence[LayerSummary], firsts: int, seconds: int, debiased: bool
) -> Floats:
    """CKA (first, second) from |X'Y|^2 of all layers (layer, layer): those of the first, then of the second.

    `seconds` is 0 where the first is compared with itself. Debiased, NaN where the estimate of a layer with
    itself is not positive.
    """
    values = np.asarray(products, np.float64)
    if debiased:
        values = _unbiased(values, np.stack([summary.lengths for summary in summaries]))
    own = np.diagonal(values)
    with np.errstate(invalid="ignore"):
        values = values / np.sqrt(np.outer(own, own))
    columns = slice(firsts, firsts + seconds) if seconds else slice(firsts)
    return np.asarray(values[:firsts, columns])


def _unbiased(products: Floats, lengths: Floats) -> Floats:
    """Song et al. (2012), equation 5, but for the factor 1 / (n (n - 3)), which cancels in CKA."""
    count = lengths.shape[1]
    shared = lengths @ lengths.T
    sums = np.outer(lengths.sum(axis=1), lengths.sum(axis=1))
    return np.asarray(products - shared + sums / ((count - 1) * (count - 2)) - 2 * shared / (count - 2))


def _centred(block: Any, summary: LayerSummary) -> NDArray[Any]:
    rows = finite_rows(block, np.empty(0, np.int64), 0)
    return np.asarray(rows - summary.mean.astype(rows.dtype))
