"""Similarity of two dissimilarity matrices when their conditions are drawn again, with replacement.

A draw is a count for each condition. A pair of different conditions then occurs as often as the product of
their counts; copies of one condition are no pair, since their dissimilarity is 0 by construction. So a draw
weights pairs, and nothing is sorted again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .rdm_similarity import Floats, Method, larger_of_two, tau_a, upper


def resampled_similarities(
    first: NDArray[np.generic], second: NDArray[np.generic], method: Method, counts: NDArray[np.int64]
) -> Floats:
    """Similarities (draw,) of two matrices (condition, condition) under counts (draw, condition).

    NaN for a draw in which the pairs of either matrix are all alike, where the method cannot use that.
    """
    a, b = np.array(first, np.float64), np.array(second, np.float64)
    for matrix in (a, b):
        np.fill_diagonal(matrix, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if method in ("cosine", "correlation"):
            return _products(a, b, counts.astype(np.float64), centre=method == "correlation")
        if method == "whitened":
            return np.array([_whitened_cosine(a, b, draw.astype(np.float64)) for draw in counts])
        return _of_ranks(upper(a), upper(b), method, counts)


def _products(a: Floats, b: Floats, counts: Floats, *, centre: bool) -> Floats:
    def total(matrix: Floats) -> Floats:
        return np.asarray(np.einsum("rn,rn->r", counts @ matrix, counts) / 2)

    cross, first, second = total(a * b), total(a * a), total(b * b)
    if centre:
        pairs = (counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)) / 2
        sum_a, sum_b = total(a), total(b)
        cross, first = cross - sum_a * sum_b / pairs, first - sum_a**2 / pairs
        second = second - sum_b**2 / pairs
    return np.asarray(cross / np.sqrt(first * second))


def _whitened_cosine(a: Floats, b: Floats, count: Floats) -> float:
    """Weighted centring leaves out pairs of copies: g_ij = -D_ij/2 less the u_i + u_j that fit it best."""
    kept = count > 0
    count = count[kept]
    centred = []
    for matrix in (a, b):
        half = -0.5 * matrix[np.ix_(kept, kept)]
        share = count.sum() - 2 * count + 2
        sums = half @ count
        level = (count * sums / share).sum() / (1 + (count / share).sum())
        effect = (sums - level) / share
        centred.append(half - effect[:, None] - effect[None, :])
    weights = np.outer(count, count)
    np.fill_diagonal(weights, count)
    x, y = centred
    products = [float((weights * left * right).sum()) for left, right in ((x, y), (x, x), (y, y))]
    return products[0] / np.sqrt(products[1] * products[2]) if products[1] * products[2] > 0 else np.nan


def _of_ranks(a: Floats, b: Floats, method: Method, counts: NDArray[np.int64]) -> Floats:
    rows, columns = np.triu_indices(counts.shape[1], 1)
    codes = [np.unique(values, return_inverse=True)[1] for values in (a, b)]
    high = None
    if method == "kendall":
        marked = [larger_of_two(values) for values in (a, b)]
        side = next((number for number in (1, 0) if marked[number] is not None), None)
        if side is not None and (chosen := marked[side]) is not None:
            high, ranked = upper(chosen), codes[1 - side]
    results = np.empty(len(counts))
    for number, draw in enumerate(counts):
        weights = (draw[rows] * draw[columns]).astype(np.float64)
        occurring = weights > 0
        if any(np.ptp(code[occurring]) == 0 for code in codes):
            results[number] = np.nan
            continue
        if method == "spearman":
            results[number] = _weighted_correlation(
                _weighted_ranks(codes[0], weights), _weighted_ranks(codes[1], weights), weights
            )
        elif high is not None:
            pairs = weights.sum()
            above = weights * high * (_weighted_ranks(ranked, weights) - (pairs + 1) / 2)
            results[number] = 4 * above.sum() / (pairs * (pairs - 1))
        else:
            repeats = weights.astype(np.int64)
            results[number] = tau_a(np.repeat(a, repeats), np.repeat(b, repeats))
    return results


def _weighted_ranks(code: NDArray[np.int64], weights: Floats) -> Floats:
    """Midranks of values, numbered in order by `code`, that occur `weights` times."""
    totals = np.bincount(code, weights)
    before = np.cumsum(totals) - totals
    return np.asarray((before + (totals + 1) / 2)[code])


def _weighted_correlation(a: Floats, b: Floats, weights: Floats) -> float:
    total = weights.sum()
    x, y = a - (weights @ a) / total, b - (weights @ b) / total
    return float((weights * x) @ y / np.sqrt(((weights * x) @ x) * ((weights * y) @ y)))
