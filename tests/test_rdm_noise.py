"""Noise in dissimilarities: whitened as scikit-learn and rsatoolbox do, cross-validated without bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dissimilarities import BLOCKINGS, METRICS, blocking, matrix, repeated, rows
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import LedoitWolf

from mechanistic.analysis.noise_covariance import Scatter, ledoit_wolf_shrinkage
from mechanistic.store.errors import DataError


@pytest.fixture(params=BLOCKINGS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """`max_bytes`, for every way in which rows are cut and held."""
    return blocking(request.param, monkeypatch)


def test_rdm_noise__crossnobis_by_hand() -> None:
    # Differences of a and b: (2, 0) and (1, 1) in the sessions; their product is 2, over two features.
    data = rows(
        [[[2.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]], word=["a", "b", "a", "b"], session=[0, 0, 1, 1]
    )
    options = {
        "metric": "crossnobis",
        "conditions": "word",
        "partitions": "session",
        "covariance": "identity",
    }
    np.testing.assert_allclose(matrix(data, **options)[0], [[0, 1], [1, 0]])


def test_rdm_noise__shrinks_as_scikit_learn_does(blocks: int) -> None:
    data = repeated()
    found = matrix(data, metric="mahalanobis", conditions="word", max_bytes=blocks)
    for place, values in enumerate(data.values):
        words = data["word"].values
        means = np.stack([values[words == word].mean(axis=0) for word in np.unique(words)])
        residual = values - means[np.unique(words, return_inverse=True)[1]]
        fitted = LedoitWolf(assume_centered=True).fit(residual)
        precision = np.linalg.inv(fitted.covariance_ * len(residual) / (len(residual) - len(means)))
        expected = squareform(pdist(means, "mahalanobis", VI=precision)) ** 2 / 5
        np.testing.assert_allclose(found[place], expected, rtol=1e-9, atol=1e-12)
        scatter = Scatter(5)
        scatter.add(residual, np.zeros(len(residual), int), np.zeros((1, 5)))
        assert ledoit_wolf_shrinkage(scatter) == pytest.approx(fitted.shrinkage_)


def definition_of_crossnobis(values: Any, words: Any, sessions: Any, precision: Any) -> np.ndarray[Any, Any]:
    names, parts = np.unique(words), np.unique(sessions)
    means = np.array([[values[(words == w) & (sessions == s)].mean(axis=0) for w in names] for s in parts])
    found = np.zeros((len(names), len(names)))
    pairs = [(m, n) for m in range(len(parts)) for n in range(len(parts)) if m != n]
    for i in range(len(names)):
        for j in range(len(names)):
            products = [
                (means[m, i] - means[m, j]) @ precision @ (means[n, i] - means[n, j]) for m, n in pairs
            ]
            found[i, j] = np.mean(products) / values.shape[1]
    return found


@pytest.mark.parametrize("sessions", [2, 3])
def test_rdm_noise__crossnobis_is_the_mean_over_pairs_of_partitions(sessions: int, blocks: int) -> None:
    data = repeated(repeats=6)
    order = np.argsort(data["word"].values, kind="stable")
    session = np.tile(np.arange(6) % sessions, 6)[np.argsort(order)]
    data = data.assign_coords(session=("row", session))
    options = {"metric": "crossnobis", "conditions": "word", "partitions": "session", "max_bytes": blocks}
    plain = matrix(data, covariance="identity", **options)
    for place, values in enumerate(data.values):
        expected = definition_of_crossnobis(values, data["word"].values, session, np.eye(5))
        np.testing.assert_allclose(plain[place], expected, atol=1e-12)
    assert (plain == plain.transpose(0, 2, 1)).all()


# The reference warns of itself.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_rdm_noise__equals_rsatoolbox() -> None:
    import rsatoolbox

    data = repeated(conditions=7, repeats=4)
    found = {
        metric: matrix(data, metric=metric, conditions="word", partitions="session") for metric in METRICS
    }
    for place, values in enumerate(data.values):
        labels = {"word": data["word"].values, "session": data["session"].values}
        dataset = rsatoolbox.data.Dataset(values, obs_descriptors=labels)
        noise = rsatoolbox.data.noise.prec_from_unbalanced(dataset, "word", method="shrinkage_eye")
        for metric in METRICS:
            options = {"noise": noise} if metric in ("mahalanobis", "crossnobis") else {}
            options |= {"cv_descriptor": "session"} if metric == "crossnobis" else {}
            expected = rsatoolbox.rdm.calc_rdm(dataset, method=metric, descriptor="word", **options)
            np.testing.assert_allclose(
                found[metric][place], expected.get_matrices()[0], rtol=1e-9, atol=1e-12
            )


def test_rdm_noise__recovers_planted_distances_without_bias() -> None:
    rng = np.random.default_rng(5)
    places = np.array([0.0, 1.0, 2.0, 2.0])
    truth = np.zeros((4, 6))
    truth[:, 2] = places
    condition, session = np.repeat(np.arange(4), 2), np.tile([0, 1], 4)
    # Two hundred little experiments, one a layer: what is biased in each is biased in their mean.
    data = rows(truth[condition] + 0.5 * rng.normal(size=(200, 8, 6)), word=condition, session=session)
    options = {"conditions": "word", "partitions": "session", "covariance": "identity"}
    unbiased = matrix(data, metric="crossnobis", **options)
    expected = (places[:, None] - places[None, :]) ** 2 / 6
    np.testing.assert_allclose(unbiased.mean(axis=0), expected, atol=0.06)
    assert unbiased[:, 2, 3].min() < 0
    assert matrix(data, metric="euclidean", conditions="word")[:, 2, 3].mean() > 0.2


def test_rdm_noise__random_partitions_keep_samples_whole_and_even() -> None:
    data = repeated().assign_coords(sample_index=("row", np.arange(48) // 2))
    data = data.sortby("word").assign_coords(sample_index=("row", np.arange(48) // 2))
    first = matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=1)
    assert (first == matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=1)).all()
    assert (first != matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=2)).any()


def test_rdm_noise__refuses_a_singular_covariance() -> None:
    few = rows(np.random.default_rng(0).normal(size=(1, 4, 9)), word=["a", "a", "b", "b"])
    with pytest.raises(DataError, match="noise covariance of layer 4 cannot be inverted"):
        matrix(few, metric="mahalanobis", conditions="word", shrinkage=0)
    assert np.isfinite(matrix(few, metric="mahalanobis", conditions="word")).all()
