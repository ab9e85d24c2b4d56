"""Ridge classification over folds, from sums that one pass over the features accumulates.

Labels are coded one column a class, +1 or -1, for the true labels and for every shuffled copy at once. All
that fitting, and the choice of the penalty, needs of a fold is its size, means and centred products X'X, X'Y,
Y'Y (`FoldMoments`), and those of a union of folds follow from their parts, so no row is looked at twice. With
fewer rows than features the same solution comes from the row-by-row products instead (`RowRidge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]

# A penalty above this share of the trace keeps the condition number below 1e5, which float32 can solve.
SINGLE_PRECISION = 1e-5


@dataclass(frozen=True)
class FoldMoments:
    """Size, means and centred products of features (d) and targets (c) over some rows."""

    count: int
    feature_mean: Floats
    target_mean: Floats
    features: Floats
    cross: Floats
    targets: Floats

    @classmethod
    def of(cls, features: Floats, targets: Floats) -> FoldMoments:
        """Of rows (n, d) and targets (n, c); centring first keeps float32 products exact enough."""
        if not len(features):
            wide, tall = features.shape[1], targets.shape[1]
            return cls(
                0,
                np.zeros(wide),
                np.zeros(tall),
                np.zeros((wide, wide), np.float32),
                np.zeros((wide, tall)),
                np.zeros(tall),
            )
        feature_mean = features.mean(axis=0, dtype=np.float64)
        target_mean = targets.mean(axis=0, dtype=np.float64)
        x = (features - feature_mean.astype(np.float32)).astype(np.float32)
        y = (targets - target_mean).astype(np.float32)
        squares = np.einsum("nc,nc->c", y, y, dtype=np.float64)
        return cls(len(x), feature_mean, target_mean, x.T @ x, (x.T @ y).astype(np.float64), squares)

    def __add__(self, other: FoldMoments) -> FoldMoments:
        """Of the union: products add, plus what the two means differ by (Chan, Golub and LeVeque 1983)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = self.count * other.count / count
        x, y = other.feature_mean - self.feature_mean, other.target_mean - self.target_mean
        return FoldMoments(
            count,
            self.feature_mean + x * (other.count / count),
            self.target_mean + y * (other.count / count),
            self.features + other.features + np.outer(x * share, x).astype(np.float32),
            self.cross + other.cross + np.outer(x * share, y),
            self.targets + other.targets + share * y**2,
        )


@dataclass(frozen=True)
class Linear:
    """scores = features @ weights (d, c) + intercept (c)."""

    weights: Floats
    intercept: Floats


class RidgePath(Protocol):
    """Models trained on some folds, one for each penalty."""

    def squared_error(self, fold: int) -> Floats:
        """Sum over the rows of a fold of (target - score)^2, for each penalty and target (penalty, c)."""
        ...

    def pick(self, best: NDArray[np.int64]) -> Linear:
        """The model that takes target j from the penalty numbered best[j]."""
        ...


class RidgeProblem(Protocol):
    """Features and targets of one layer, in folds numbered from 0."""

    @property
    def folds(self) -> int: ...

    def path(self, train: Sequence[int], penalties: Sequence[float]) -> RidgePath:
        """Fit on some folds, for each penalty, on features standardised over those folds."""
        ...


@dataclass(frozen=True)
class MomentRidge:
    """The problem as one FoldMoments a fold: for more rows than features, in any number of blocks."""

    moments: Sequence[FoldMoments]

    @property
    def folds(self) -> int:
        return len(self.moments)

    def path(self, train: Sequence[int], penalties: Sequence[float]) -> MomentPath:
        total = reduce(FoldMoments.__add__, [self.moments[fold] for fold in train])
        scale = _scale(np.diag(total.features) / total.count)
        gram = total.features / (scale[:, None] * (scale[None, :] * total.count))
        cross = total.cross / (scale[:, None] * total.count)
        weights = np.stack([solution / scale[:, None] for solution in _solve_path(gram, cross, penalties)])
        intercept = total.target_mean - np.einsum("d,pdc->pc", total.feature_mean, weights)
        return MomentPath(self.moments, weights.astype(np.float32), intercept)


@dataclass(frozen=True)
class MomentPath:
    """weights (penalty, d, c), intercept (penalty, c)."""

    moments: Sequence[FoldMoments]
    weights: NDArray[np.float32]
    intercept: Floats

    def squared_error(self, fold: int) -> Floats:
        part = self.moments[fold]
        errors = []
        for weights, intercept in zip(self.weights, self.intercept, strict=True):
            shift = part.target_mean - part.feature_mean @ weights - intercept
            explained = np.einsum("dc,dc->c", weights, part.features @ weights - 2 * part.cross)
            errors.append(part.targets + explained + part.count * shift**2)
        return np.stack(errors)

    def pick(self, best: NDArray[np.int64]) -> Linear:
        columns = np.arange(len(best))
        return Linear(self.weights[best, :, columns].T, self.intercept[best, columns])


@dataclass(frozen=True)
class RowRidge:
    """The problem as its rows (n, d) and targets (n, c), in memory: for no more rows than features."""

    features: Floats
    targets: Floats
    fold: NDArray[Any]
    folds: int

    def path(self, train: Sequence[int], penalties: Sequence[float]) -> RowPath:
        rows = np.isin(self.fold, list(train))
        mean = self.features[rows].mean(axis=0, dtype=np.float64)
        target_mean = self.targets[rows].mean(axis=0, dtype=np.float64)
        x = self.features.astype(np.float32) - mean.astype(np.float32)
        scale = _scale(np.einsum("nd,nd->d", x[rows], x[rows], dtype=np.float64) / rows.sum())
        x *= (1 / scale).astype(np.float32)
        products = x @ x[rows].T
        count = rows.sum()
        right = (self.targets[rows] - target_mean) / count
        duals = np.stack(list(_solve_path(products[rows] / count, right, penalties)))
        return RowPath(
            self, products, duals.astype(np.float32), x[rows] / scale.astype(np.float32), mean, target_mean
        )


@dataclass(frozen=True)
class RowPath:
    """Row-by-row products (n, training row), dual weights (penalty, training row, c); see `RowRidge`."""

    problem: RowRidge
    products: Floats
    duals: NDArray[np.float32]
    basis: Floats
    mean: Floats
    target_mean: Floats

    def squared_error(self, fold: int) -> Floats:
        rows = self.problem.fold == fold
        scores = self.products[rows] @ self.duals + self.target_mean
        return np.asarray(((self.problem.targets[rows] - scores) ** 2).sum(axis=1))

    def pick(self, best: NDArray[np.int64]) -> Linear:
        weights = self.basis.T @ self.duals[best, :, np.arange(len(best))].T
        return Linear(weights, self.target_mean - self.mean @ weights)


@dataclass(frozen=True)
class FoldedFit:
    """One model for each fold, fitted on the other folds, and one fitted on all of them.

    weights (fold + 1, d, c), intercept (fold + 1, c), penalty (fold + 1, c); the last entry is of all folds.
    """

    weights: NDArray[np.float32]
    intercept: NDArray[np.float64]
    penalty: NDArray[np.float64]


def fit_folds(problem: RidgeProblem, penalties: Sequence[float], classes: int) -> FoldedFit:
    """Fit for every held-out fold, choosing the penalty inside the training folds alone.

    The penalty of a labelling is the one with the least squared error over the training folds, each predicted
    from the remaining ones; each shuffled copy of the labels chooses its own.
    """
    everything = range(problem.folds)
    inner: dict[tuple[int, int], Floats] = {}
    for first, second in combinations(everything, 2):
        path = problem.path([fold for fold in everything if fold not in (first, second)], penalties)
        # inner[f, g]: trained on neither, so what g says about penalties when f is held out.
        inner[first, second], inner[second, first] = path.squared_error(second), path.squared_error(first)
    models, chosen, outer = [], [], []
    for held_out in everything:
        path = problem.path([fold for fold in everything if fold != held_out], penalties)
        best = _best([inner[held_out, fold] for fold in everything if fold != held_out], classes)
        outer.append(path.squared_error(held_out))
        models.append(path.pick(best))
        chosen.append(np.asarray(penalties)[best])
    best = _best(outer, classes)
    models.append(problem.path(list(everything), penalties).pick(best))
    return FoldedFit(
        np.stack([model.weights for model in models]).astype(np.float32),
        np.stack([model.intercept for model in models]),
        np.stack([*chosen, np.asarray(penalties)[best]]),
    )


def _best(errors: Sequence[Floats], classes: int) -> NDArray[np.int64]:
    """For each target the number of its labelling's best penalty."""
    total = np.sum(errors, axis=0)
    return np.repeat(total.reshape(len(total), -1, classes).sum(axis=-1).argmin(axis=0), classes)


def _solve_path(gram: Floats, right: Floats, penalties: Sequence[float]) -> Iterator[Floats]:
    """Solve (gram + penalty I) w = right; in float64 where the penalty is too small for float32."""
    from scipy.linalg import cho_factor, cho_solve

    trace = float(np.trace(gram))
    for penalty in penalties:
        dtype = np.float32 if penalty > SINGLE_PRECISION * trace else np.float64
        shifted: NDArray[np.floating[Any]] = np.array(gram, dtype)
        shifted.flat[:: len(shifted) + 1] += penalty
        factor = cho_factor(shifted, lower=True, overwrite_a=True, check_finite=False)
        yield cho_solve(factor, right.astype(dtype), check_finite=False)


def _scale(variance: Floats) -> Floats:
    """Standard deviations; 1 for a feature that is constant, whose weight then stays 0."""
    deviation = np.sqrt(np.asarray(variance, np.float64))
    return np.where(deviation > 0, deviation, 1.0)
