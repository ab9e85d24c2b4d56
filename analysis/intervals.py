"""Confidence intervals of means and of shares."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError, SpecificationError

Floats = NDArray[np.float64]

# A matrix of resampling weights is built in pieces of about this many numbers.
_PIECE = 1 << 22


def t_interval(values: NDArray[Any], *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Student's interval of the mean over the last axis, mean -+ t_{n-1} s / sqrt(n).

    Returns
    -------
    low, high (...), float64, units of `values`.
        NaN for fewer than two values, which have no spread, and wherever a value is NaN.

    Raises
    ------
    SpecificationError  `level` is not between 0 and 1.
    """
    from scipy.special import stdtrit

    _check(level)
    values = np.asarray(values, np.float64)
    count = values.shape[-1]
    mean = values.mean(axis=-1) if count else np.full(values.shape[:-1], np.nan)
    if count < 2:
        return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stdtrit(count - 1, 0.5 + level / 2) * values.std(axis=-1, ddof=1) / np.sqrt(count)
    return mean - half, mean + half


def bootstrap_interval(
    values: NDArray[Any],
    *,
    level: float = 0.95,
    clusters: NDArray[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval of the mean over the last axis.

    Parameters
    ----------
    clusters
        Values that belong together, such as the samples of a minimal-pair set, carry one label (n,) and are
        drawn together. None draws single values.

    Returns
    -------
    low, high (...), float64, units of `values`.
        NaN for fewer than two clusters, and wherever a value is NaN.

    Raises
    ------
    SpecificationError  `level` is not between 0 and 1, or there are no resamples.
    DimensionError      `clusters` does not have a label for each value.

    References
    ----------
    Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    _check(level)
    if resamples < 1:
        raise SpecificationError(f"resamples is {resamples}.", "Draw at least one, usually thousands.")
    values = np.asarray(values, np.float64)
    sums, sizes = _by_cluster(values, clusters)
    count = len(sizes)
    if count < 2:
        return np.full(values.shape[:-1], np.nan), np.full(values.shape[:-1], np.nan)
    rng = np.random.default_rng(seed)
    means = np.empty((*values.shape[:-1], resamples))
    step = max(1, _PIECE // count)
    for start in range(0, resamples, step):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        means[..., start : start + len(draws)] = sums @ draws.T / (draws @ sizes)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2], axis=-1)
    return low, high


def wilson_interval(share: Any, count: Any, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a share of `count` independent trials; stays within 0 and 1.

    Returns
    -------
    low, high (...), float64; NaN where `count` is 0.

    References
    ----------
    Wilson (1927), Journal of the American Statistical Association 22, 209.
    """
    from scipy.special import ndtri

    _check(level)
    share, count = np.asarray(share, np.float64), np.asarray(count, np.float64)
    squared = float(ndtri(0.5 + level / 2)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (share + squared / (2 * count)) / (1 + squared / count)
        spread = share * (1 - share) / count + squared / (4 * count**2)
        half = np.sqrt(squared * spread) / (1 + squared / count)
    # Rounding must not put a share of 0 or 1 outside of its own interval.
    return np.clip(np.minimum(centre - half, share), 0, 1), np.clip(np.maximum(centre + half, share), 0, 1)


def clustered_share_interval(
    hits: NDArray[Any], clusters: NDArray[Any], *, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Interval of a share whose trials come in clusters: Wilson's, for the effective number of trials.

    The effective number is p (1 - p) / v, where v is the variance of the share over clusters, kept between
    the number of clusters and the number of trials. All right or all wrong counts every cluster once.

    Parameters
    ----------
    hits
        (..., n), 1 for a right answer and 0 for a wrong one.
    clusters
        (n,), the label of each trial's cluster.

    Returns
    -------
    low, high (...), float64, shares.

    References
    ----------
    Dean and Pagano (2015), Journal of Survey Statistics and Methodology 3, 484.
    """
    hits = np.asarray(hits, np.float64)
    sums, sizes = _by_cluster(hits, clusters)
    share = sums.sum(axis=-1) / sizes.sum()
    count = len(sizes)
    residual = sums - share[..., None] * sizes
    variance = (residual**2).sum(axis=-1) / sizes.sum() ** 2 * (count / max(1, count - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(variance > 0, share * (1 - share) / variance, count)
    return wilson_interval(share, np.clip(effective, count, sizes.sum()), level=level)


def clustered_ratio_interval(
    gains: NDArray[Any], totals: NDArray[Any], clusters: NDArray[Any], *, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Student's interval of a ratio of sums r = sum g / sum t whose terms come in clusters, such as R^2.

    The variance is that of the linearised ratio, sum over clusters of (g - r t)^2 / (sum t)^2.

    Parameters
    ----------
    gains, totals
        (..., n), the terms of the two sums.
    clusters
        (n,), the label of each term's cluster.

    Returns
    -------
    low, high (...), float64, units of the ratio; NaN for fewer than two clusters.

    References
    ----------
    Cochran (1977), Sampling Techniques, sections 6.3 and 9A.2.
    """
    from scipy.special import stdtrit

    _check(level)
    parts, _ = _by_cluster(np.asarray(gains, np.float64), clusters)
    wholes, sizes = _by_cluster(np.asarray(totals, np.float64), clusters)
    count, whole = len(sizes), wholes.sum(axis=-1)
    ratio = parts.sum(axis=-1) / whole
    if count < 2:
        return np.full_like(ratio, np.nan), np.full_like(ratio, np.nan)
    squares = ((parts - ratio[..., None] * wholes) ** 2).sum(axis=-1)
    half = stdtrit(count - 1, 0.5 + level / 2) * np.sqrt(squares * count / (count - 1)) / whole
    return ratio - half, ratio + half


def _by_cluster(values: Floats, clusters: NDArray[Any] | None) -> tuple[Floats, Floats]:
    """Sums (..., cluster) and sizes (cluster)."""
    if clusters is None:
        return values, np.ones(values.shape[-1])
    clusters = np.asarray(clusters)
    if clusters.shape != values.shape[-1:]:
        raise DimensionError(
            f"there are {values.shape[-1]} values but clusters of the shape {clusters.shape}.",
            "Give one cluster label for each value.",
        )
    names, code = np.unique(clusters, return_inverse=True)
    order = np.argsort(code, kind="stable")
    sizes = np.bincount(code, minlength=len(names)).astype(np.float64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return np.add.reduceat(values[..., order], starts, axis=-1), sizes


def _check(level: float) -> None:
    if not 0 < level < 1:
        raise SpecificationError(f"level is {level}.", "Give the coverage as a share, such as level=0.95.")
