"""How alike two dissimilarity matrices are: cosine, correlation, Spearman, Kendall's tau-a, whitened cosine.

A matrix is prepared once, as a symmetric square S; the similarity of two is then sum_ij S_ij S'_ij.
Reordering the conditions reorders the square, so a permutation test prepares nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["spearman", "kendall", "cosine", "correlation", "whitened"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prepared:
    """`square` (condition, condition), its norm 1; for Kendall's tau-a centred ranks instead.

    `high`, for Kendall's tau-a only, marks the larger of a model's two values; None if it has more of them.
    """

    square: Floats
    high: Floats | None = None


def prepare(matrix: NDArray[np.generic], method: Method) -> Prepared:
    """Prepare a matrix (condition, condition); NaN if its pairs are all alike, and so order nothing."""
    pairs = upper(matrix)
    if pairs.max() == pairs.min() and (method not in ("cosine", "whitened") or pairs.max() == 0):
        return Prepared(np.full(matrix.shape, np.nan))
    if method == "whitened":
        return Prepared(_unit(whitened(np.asarray(matrix, np.float64))))
    if method == "kendall":
        return Prepared(square(_centred(midranks(pairs))), larger_of_two(pairs))
    if method == "spearman":
        pairs = midranks(pairs)
    return Prepared(_unit(square(pairs if method == "cosine" else _centred(pairs))))


def similarity(
    first: Prepared, second: Prepared, method: Method, order: NDArray[np.int64] | None = None
) -> float:
    """The similarity of two prepared matrices; `order` puts the conditions of the second in another order."""
    if method != "kendall":
        return float(np.vdot(first.square, _reordered(second.square, order)))
    pairs = len(first.square) * (len(first.square) - 1) // 2
    total = pairs * (pairs - 1) / 2
    # Where one side has two values, concordant less discordant is twice the sum of the other's centred ranks
    # over its larger value; a square holds each pair twice already.
    if second.high is not None:
        return float(np.vdot(first.square, _reordered(second.high, order)) / total)
    if first.high is not None:
        return float(np.vdot(first.high, _reordered(second.square, order)) / total)
    return tau_a(upper(first.square), upper(_reordered(second.square, order)))


def tau_a(first: Floats, second: Floats) -> float:
    """Kendall's tau-a: (concordant - discordant) / all pairs; ties count in the denominator.

    References
    ----------
    Nili et al. (2014), PLoS Computational Biology 10, e1003553.
    """
    from scipy.stats import kendalltau

    total = len(first) * (len(first) - 1) / 2
    untied = [total - _tied(values) for values in (first, second)]
    # scipy gives tau-b, whose denominator leaves out ties on either side.
    return float(kendalltau(first, second).statistic * np.sqrt(untied[0] * untied[1]) / total)


def upper(matrix: NDArray[np.generic]) -> Floats:
    """The values above the diagonal, row by row."""
    return np.asarray(matrix[np.triu_indices(len(matrix), 1)], np.float64)


def square(pairs: Floats) -> Floats:
    """The symmetric matrix with these values above its diagonal, and zeros on it."""
    size = round((1 + np.sqrt(1 + 8 * len(pairs))) / 2)
    result = np.zeros((size, size))
    result[np.triu_indices(size, 1)] = pairs
    return result + result.T


def midranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), np.float64)


def whitened(matrix: Floats) -> Floats:
    """-D/2 centred over rows and columns: its cosine is that of distances whitened by their covariance.

    References
    ----------
    Diedrichsen et al. (2021), Neurons, Behavior, Data analysis, and Theory 5. For squared distances it equals
    the linear CKA of the patterns.
    """
    half = -0.5 * matrix
    means = half.mean(axis=0)
    return np.asarray(half - means[:, None] - means[None, :] + means.mean())


def _reordered(values: Floats, order: NDArray[np.int64] | None) -> Floats:
    return values if order is None else values.take(order, axis=0).take(order, axis=1)


def _centred(values: Floats) -> Floats:
    return np.asarray(values - values.mean())


def _unit(values: Floats) -> Floats:
    return np.asarray(values / np.linalg.norm(values))


def larger_of_two(pairs: Floats) -> Floats | None:
    """A square of 0 and 1 that marks the larger of two values; None if there are more than two."""
    larger = pairs == pairs.max()
    return square(larger.astype(np.float64)) if (larger | (pairs == pairs.min())).all() else None


def _tied(values: Floats) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())
