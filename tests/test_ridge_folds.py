"""Ridge from fold moments and from rows: the same numbers as scikit-learn's, and as each other's."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechanistic.analysis.penalty_choice import RidgeProblem, fit_folds, fold_pairs
from mechanistic.analysis.ridge_folds import FoldSums, MomentRidge, RowRidge, rough_centre

PENALTIES = (0.01, 0.3, 5.0)
FOLDS = 5
OWNER = np.repeat([0, 1], 3)


def problem(rows: int, width: int, classes: int = 3, labellings: int = 2) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(rows * width)
    features = (rng.normal(size=(rows, width)) * np.exp(rng.normal(size=width)) + 5).astype(np.float32)
    codes = rng.integers(classes, size=(rows, labellings))
    targets = (np.eye(classes)[codes].reshape(rows, -1) * 2 - 1).astype(np.float32)
    return features, targets, rng.permutation(np.arange(rows) % FOLDS)


def both(features: Any, targets: Any, fold: Any) -> list[RidgeProblem]:
    centre = rough_centre(features[fold == 0], targets[fold == 0])
    parts = [FoldSums.of(features[fold == k], targets[fold == k], centre) for k in range(FOLDS)]
    return [MomentRidge(parts), RowRidge(features, targets, fold, FOLDS)]


def reference(features: Any, targets: Any, penalty: float) -> Any:
    return make_pipeline(StandardScaler(), Ridge(penalty * len(features))).fit(features, targets)


def test_sums__by_hand() -> None:
    features = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32)
    targets = np.array([[1.0], [-1.0]], np.float32)
    sums = FoldSums.of(features, targets, (np.array([1.0, 1.0]), np.array([0.0])))
    assert sums.count == 2
    assert sums.feature_sum.tolist() == [2, 2]
    assert sums.target_sum.tolist() == [0]
    assert np.triu(sums.features).tolist() == [[4, 6], [0, 10]]
    assert np.triu(sums.centred()).tolist() == [[2, 4], [0, 8]]
    assert sums.cross.tolist() == [[-2], [-4]]
    assert sums.targets.tolist() == [2]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_sums__of_parts_add_up(cuts: list[int]) -> None:
    features, targets, _ = problem(60, 8)
    edges, centre = [0, *sorted(cuts), 60], rough_centre(features[:7], targets[:7])
    parts = [FoldSums.of(features[a:b], targets[a:b], centre) for a, b in pairwise(edges)]
    total, whole = reduce(lambda a, b: a + b, parts), FoldSums.of(features, targets, centre)
    assert total.count == 60
    for name in ("feature_sum", "target_sum", "features", "cross", "targets"):
        of_parts, of_whole = (np.asarray(getattr(sums, name)) for sums in (total, whole))
        if name == "features":
            of_parts, of_whole = np.triu(of_parts), np.triu(of_whole)
        np.testing.assert_allclose(of_parts, of_whole, rtol=2e-4, atol=2e-3)


def test_sums__survive_massive_activations() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6)).astype(np.float32)
    features[:, 2] += 2500
    centre = rough_centre(features[:150], features[:150, :1])
    first, second = (FoldSums.of(part, part[:, :1], centre) for part in (features[:150], features[150:]))
    expected = np.cov(features.astype(np.float64).T, bias=True) * 400
    np.testing.assert_allclose(np.triu((first + second).centred()), np.triu(expected), atol=0.05)


@pytest.mark.parametrize(("rows", "width"), [(80, 10), (24, 40)])
def test_path__equals_scikit_learn(rows: int, width: int) -> None:
    features, targets, fold = problem(rows, width)
    kept = ~np.isin(fold, [1, 4])
    for each in both(features, targets, fold):
        path = each.path([1, 4], PENALTIES)
        errors = path.squared_error(1)
        for place, penalty in enumerate(PENALTIES):
            expected = reference(features[kept], targets[kept], penalty)
            model = path.pick(np.full(targets.shape[1], place))
            scores = features @ model.weights + model.intercept
            np.testing.assert_allclose(scores, expected.predict(features), atol=2e-3)
            held_out = ((targets[fold == 1] - expected.predict(features[fold == 1])) ** 2).sum(0)
            np.testing.assert_allclose(errors[place], held_out, rtol=2e-3, atol=2e-3)


def test_path__a_constant_feature_gets_no_weight() -> None:
    features, targets, fold = problem(80, 10)
    features[:, 4] = 7
    for each in both(features, targets, fold):
        weights = each.path([3], PENALTIES).pick(np.zeros(6, int)).weights
        assert (weights[4] == 0).all()
        assert np.isfinite(weights).all()


@pytest.mark.parametrize(("rows", "width"), [(80, 10), (24, 40)])
def test_fit_folds__chooses_the_penalty_without_the_held_out_fold(rows: int, width: int) -> None:
    """Against the nested loop written out with scikit-learn; each labelling chooses for itself."""
    features, targets, fold = problem(rows, width)
    for each in both(features, targets, fold):
        fit = fit_folds(each, PENALTIES, OWNER)
        for held_out in (*range(FOLDS), None):
            train = [k for k in range(FOLDS) if k != held_out]
            errors = np.zeros((len(PENALTIES), 6))
            pairs = [*fold_pairs(FOLDS), *(pair[::-1] for pair in fold_pairs(FOLDS))]
            for inner, other in [pair for pair in pairs if held_out in (None, pair[1])]:
                rest = ~np.isin(fold, [inner, other])
                for place, penalty in enumerate(PENALTIES):
                    model = reference(features[rest], targets[rest], penalty)
                    errors[place] += (
                        (targets[fold == inner] - model.predict(features[fold == inner])) ** 2
                    ).sum(0)
            best = errors.reshape(len(PENALTIES), 2, 3).sum(-1).argmin(0)
            number = FOLDS if held_out is None else held_out
            np.testing.assert_allclose(fit.penalty[number], np.repeat(np.array(PENALTIES)[best], 3))
            kept = np.isin(fold, train)
            for labelling in range(2):
                columns = slice(3 * labelling, 3 * labelling + 3)
                model = reference(features[kept], targets[kept, columns], PENALTIES[best[labelling]])
                scores = features @ fit.weights[number][:, columns] + fit.intercept[number][columns]
                np.testing.assert_allclose(scores, model.predict(features), atol=3e-3)


def test_fit_folds__moments_and_rows_agree() -> None:
    features, targets, fold = problem(60, 20)
    first, second = (fit_folds(each, PENALTIES, OWNER) for each in both(features, targets, fold))
    np.testing.assert_allclose(first.weights, second.weights, atol=1e-3)
    np.testing.assert_array_equal(first.penalty, second.penalty)
