"""Confidence intervals: by hand, against scipy, and that they cover what they say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mechanistic.analysis.intervals import (
    bootstrap_interval,
    clustered_ratio_interval,
    clustered_share_interval,
    t_interval,
    wilson_interval,
)
from mechanistic.store.errors import DimensionError, SpecificationError


def test_t_interval__by_hand() -> None:
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    half = 4.302652729911275 / np.sqrt(3)
    np.testing.assert_allclose([low, high], [2 - half, 2 + half])


def test_t_interval__equals_scipy() -> None:
    values = np.random.default_rng(0).normal(size=(3, 2, 9))
    expected = scipy.stats.t.interval(0.9, 8, values.mean(-1), scipy.stats.sem(values, axis=-1))
    np.testing.assert_allclose(t_interval(values, level=0.9), expected)


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_intervals__one_value_has_no_spread(interval: type) -> None:
    for values in (np.ones((2, 1)), np.ones((2, 0))):
        low, high = interval(values)
        assert low.shape == high.shape == (2,)
        assert np.isnan([low, high]).all()


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_intervals__nan_is_not_averaged_away(interval: type) -> None:
    low, high = interval(np.array([[1.0, np.nan, 2.0], [1.0, 1.5, 2.0]]))
    assert np.isnan([low[0], high[0]]).all()
    assert np.isfinite([low[1], high[1]]).all()


def test_bootstrap_interval__equals_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=200)
    ours = bootstrap_interval(values, resamples=4000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_bootstrap_interval__draws_clusters_together() -> None:
    rng = np.random.default_rng(2)
    of_cluster = rng.normal(size=30)
    values, clusters = np.repeat(of_cluster, 4), np.repeat(np.arange(30), 4)
    order = rng.permutation(120)
    clustered = bootstrap_interval(values[order], clusters=clusters[order])
    np.testing.assert_allclose(clustered, bootstrap_interval(of_cluster), atol=0.03)
    alone = bootstrap_interval(values)
    assert 1.7 < (clustered[1] - clustered[0]) / (alone[1] - alone[0]) < 2.3, "twice as wide: 4 copies each"


def test_wilson_interval__equals_scipy() -> None:
    for hits, count in ((0, 7), (3, 10), (95, 100), (12, 12)):
        expected = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson_interval(hits / count, count), expected, atol=1e-12)


def test_clustered_share_interval__of_single_trials_is_wilsons() -> None:
    hits = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1])
    expected = scipy.stats.binomtest(7, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose(clustered_share_interval(hits, np.arange(10)), expected, atol=1e-12)


def test_clustered_share_interval__counts_every_cluster_once_when_all_are_right() -> None:
    expected = scipy.stats.binomtest(20, 20).proportion_ci(method="wilson")
    actual = clustered_share_interval(np.ones(80), np.repeat(np.arange(20), 4))
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize(("share", "correlation"), [(0.9, 0.3), (0.5, 0.6), (0.25, 0.0)])
def test_clustered_share_interval__covers_what_it_says(share: float, correlation: float) -> None:
    rng = np.random.default_rng(3)
    clusters, covered, trials = np.repeat(np.arange(60), 4), 0, 600
    weight = (1 - correlation) / max(correlation, 1e-9)
    for _ in range(trials):
        own = rng.beta(share * weight, (1 - share) * weight, 60) if correlation else np.full(60, share)
        low, high = clustered_share_interval(rng.random(240) < own[clusters], clusters)
        covered += bool(low <= share <= high)
    assert 0.92 <= covered / trials <= 0.98


def test_intervals__errors() -> None:
    with pytest.raises(SpecificationError, match="level is 95"):
        t_interval(np.ones(3), level=95)
    with pytest.raises(SpecificationError, match="resamples is 0"):
        bootstrap_interval(np.ones(3), resamples=0)
    with pytest.raises(DimensionError, match="3 values but clusters of the shape"):
        bootstrap_interval(np.ones(3), clusters=np.arange(2))


def test_clustered_ratio_interval__by_hand() -> None:
    """r = 1/2, residuals of the clusters 1/2 and -1/2: half width t_1(0.975) sqrt(2 * 1/2) / 2."""
    low, high = clustered_ratio_interval(np.array([1.0, 0.0]), np.ones(2), np.arange(2))
    np.testing.assert_allclose([low, high], [0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2], rtol=1e-5)
    assert np.isnan(clustered_ratio_interval(np.ones(2), np.ones(2), np.zeros(2))).all()


def test_clustered_ratio_interval__equal_totals_give_students_interval_over_clusters() -> None:
    gains = np.random.default_rng(0).normal(size=(3, 40))
    bounds = clustered_ratio_interval(gains, np.ones_like(gains), np.repeat(np.arange(10), 4))
    np.testing.assert_allclose(bounds, t_interval(gains.reshape(3, 10, 4).mean(-1)))


def test_clustered_ratio_interval__covers_a_ratio_of_clustered_sums() -> None:
    rng, covered = np.random.default_rng(1), 0
    clusters = np.repeat(np.arange(50), 4)
    for _ in range(400):
        totals = rng.uniform(1, 3, 200)
        gains = totals * (0.6 + 0.3 * rng.normal(size=50)[clusters]) + 0.2 * rng.normal(size=200)
        low, high = clustered_ratio_interval(gains, totals, clusters)
        covered += bool(low < 0.6 < high)
    assert 0.91 < covered / 400 < 0.98
