"""Ridge regression over folds, from sums that one pass over the features accumulates.

Every target is a column: +1 or -1 for a class, the value itself where it is continuous, for the true labels
and for every shuffled copy at once. All that fitting, and the choice of the penalty, needs of a fold is its
size, means and centred products X'X, X'Y, Y'Y (`FoldMoments`), and those of a union of folds follow from
their parts, so no row is looked at twice. With fewer rows than features the same solution comes from the
row-by-row products
instead (`RowRidge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

Floats = NDArray[Any]

# Below this share of the trace a penalty leaves a condition number that float32 cannot solve.
SINGLE_PRECISION = 2e-6


@dataclass(frozen=True)
class FoldMoments:
    """Size, means and centred products of features (d) and targets (c) over some rows.

    Of the symmetric `features` only the upper triangle counts: completing it takes a third of the time that
    making it does.
    """

    count: int
    feature_mean: Floats
    target_mean: Floats
    features: Floats
    cross: Floats
    targets: Floats

    @classmethod
    def of(cls, features: Floats, targets: Floats) -> FoldMoments:
        """Of rows (n, d) and targets (n, c); centring first keeps float32 products exact enough."""
        from scipy.linalg.blas import ssyrk

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
        x = np.subtract(features, feature_mean.astype(np.float32), dtype=np.float32)
        y = (targets - target_mean).astype(np.float32)
        squares = np.einsum("nc,nc->c", y, y, dtype=np.float64)
        # The transposed view is in the order that BLAS works in, and its lower triangle is our upper one.
        products = ssyrk(1.0, x.T, lower=1).T
        return cls(len(x), feature_mean, target_mean, products, (x.T @ y).astype(np.float64), squares)

    def __add__(self, other: FoldMoments) -> FoldMoments:
        """Of the union: products add, plus what the two means differ by (Chan, Golub and LeVeque 1983)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = self.count * other.count / count
        x, y = other.feature_mean - self.feature_mean, other.target_mean - self.target_mean
        features = _add_outer(self.features + other.features, x, share)
        return FoldMoments(
            count,
            self.feature_mean + x * (other.count / count),
            self.target_mean + y * (other.count / count),
            features,
            self.cross + other.cross + np.outer(x * share, y),
            self.targets + other.targets + share * y**2,
        )

    def about(self, feature_centre: Floats, target_centre: Floats) -> FoldSums:
        """The products about a common centre, which can be added and taken away as they are."""
        x, y = self.feature_mean - feature_centre, self.target_mean - target_centre
        cross = self.cross + np.outer(x * self.count, y)
        targets = self.targets + y**2 * self.count
        return FoldSums(self.count, x * self.count, y * self.count, self.features, x, cross, targets)


@dataclass(frozen=True)
class FoldSums:
    """Sums and products over some rows about a centre that all folds share.

    Of the features only the products about their own mean are held, which is `offset` from that centre: the
    rest is an outer product, cheaper to add anew than to keep.
    """

    count: int
    feature_sum: Floats
    target_sum: Floats
    centred: Floats
    offset: Floats
    cross: Floats
    targets: Floats

    def add_to(self, matrix: Floats) -> None:
        """Add X'X about the common centre, in place."""
        matrix += self.centred
        _add_outer(matrix, self.offset, self.count)

    def take_from(self, matrix: Floats) -> None:
        matrix -= self.centred
        _add_outer(matrix, self.offset, -self.count)

    def quadratic(self, weights: Floats) -> Floats:
        """w' X'X w about the common centre, for each column of weights (d, c)."""
        from scipy.linalg.blas import ssymm

        own = np.einsum("dc,dc->c", weights, ssymm(1.0, self.centred.T, weights, lower=1))
        return np.asarray(own + self.count * (self.offset.astype(weights.dtype) @ weights) ** 2)


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

    def path(self, held_out: Sequence[int], penalties: Sequence[float]) -> RidgePath:
        """Fit on all but some folds, for each penalty, on features standardised over the rest."""
        ...


@dataclass(frozen=True)
class MomentRidge:
    """The problem as one FoldMoments a fold: for more rows than features, in any number of blocks."""

    moments: Sequence[FoldMoments]

    @property
    def folds(self) -> int:
        return len(self.moments)

    @cached_property
    def centre(self) -> tuple[Floats, Floats]:
        """Means of the features and targets over all rows."""
        count = sum(fold.count for fold in self.moments)
        features = np.sum([fold.feature_mean * (fold.count / count) for fold in self.moments], axis=0)
        targets = np.sum([fold.target_mean * (fold.count / count) for fold in self.moments], axis=0)
        return features, targets

    @cached_property
    def parts(self) -> list[FoldSums]:
        return [fold.about(*self.centre) for fold in self.moments]

    @cached_property
    def products(self) -> Floats:
        """X'X of all rows about their mean."""
        total = np.zeros_like(self.moments[0].features)
        for part in self.parts:
            part.add_to(total)
        return total

    @cached_property
    def scratch(self) -> tuple[Floats, Floats]:
        # New memory costs more than the arithmetic done in it; a layer is fitted by one thread.
        return np.empty_like(self.products), np.empty_like(self.products)

    def path(self, held_out: Sequence[int], penalties: Sequence[float]) -> MomentPath:
        """Penalties are on standardised features: (X'X + n a diag(s^2)) w = X'y in the units of X."""
        train = [part for fold, part in enumerate(self.parts) if fold not in held_out]
        count = sum(part.count for part in train)
        mean = np.sum([part.feature_sum for part in train], axis=0) / count
        target_mean = np.sum([part.target_sum for part in train], axis=0) / count
        gram, spare = self.scratch
        np.copyto(gram, self.products)
        for fold in held_out:
            self.parts[fold].take_from(gram)
        _add_outer(gram, mean, -count)
        cross = np.sum([part.cross for part in train], axis=0) - np.outer(mean * count, target_mean)
        squares = np.diag(gram).astype(np.float64)
        # Taking folds away leaves a constant feature a trace of variance; its weight must be exactly 0.
        constant = squares <= 1e-6 * np.diag(self.products)
        if constant.any():
            squares[constant] = count
            cross[constant] = gram[constant] = gram[:, constant] = 0
        weights = np.stack(list(_solve_path(gram, cross, squares, penalties, spare)))
        return MomentPath(self, weights, target_mean - np.einsum("d,pdc->pc", mean, weights))


@dataclass(frozen=True)
class MomentPath:
    """weights (penalty, d, c), intercept (penalty, c) about the common centre."""

    problem: MomentRidge
    weights: NDArray[np.float32]
    intercept: Floats

    def squared_error(self, fold: int) -> Floats:
        part, offset = self.problem.parts[fold], self.intercept
        explained = np.stack([part.quadratic(w) for w in self.weights])
        cross = np.einsum("pdc,dc->pc", self.weights, part.cross.astype(np.float32))
        mean = np.einsum("pdc,d->pc", self.weights, part.feature_sum.astype(np.float32))
        return np.asarray(
            part.targets
            - 2 * (cross + offset * part.target_sum - offset * mean)
            + explained
            + part.count * offset**2
        )

    def pick(self, best: NDArray[np.int64]) -> Linear:
        columns, (feature_mean, target_mean) = np.arange(len(best)), self.problem.centre
        weights = self.weights[best, :, columns].T
        return Linear(weights, self.intercept[best, columns] + target_mean - feature_mean @ weights)


@dataclass(frozen=True)
class RowRidge:
    """The problem as its rows (n, d) and targets (n, c), in memory: for no more rows than features."""

    features: Floats
    targets: Floats
    fold: NDArray[Any]
    folds: int

    def path(self, held_out: Sequence[int], penalties: Sequence[float]) -> RowPath:
        rows = ~np.isin(self.fold, list(held_out))
        mean = self.features[rows].mean(axis=0, dtype=np.float64)
        target_mean = self.targets[rows].mean(axis=0, dtype=np.float64)
        x = self.features.astype(np.float32) - mean.astype(np.float32)
        scale = _scale(np.einsum("nd,nd->d", x[rows], x[rows], dtype=np.float64) / rows.sum())
        x *= (1 / scale).astype(np.float32)
        products = x @ x[rows].T
        right = self.targets[rows] - target_mean
        count = np.full(rows.sum(), float(rows.sum()))
        duals = np.stack(list(_solve_path(products[rows], right, count, penalties)))
        return RowPath(self, products, duals, x[rows] / scale.astype(np.float32), mean, target_mean)


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


def _solve_path(
    gram: Floats, right: Floats, ridge: Floats, penalties: Sequence[float], spare: Floats | None = None
) -> Iterator[NDArray[np.float32]]:
    """Solve (gram + penalty diag(ridge)) w = right; in float64 where the penalty is too small for float32."""
    from scipy.linalg import lapack

    trace = float((np.diag(gram) / ridge).sum())
    rights = {
        single: np.asarray(right, np.float32 if single else np.float64, order="F") for single in (False, True)
    }
    for penalty in penalties:
        single = penalty > SINGLE_PRECISION * trace
        factorise, solve = (lapack.spotrf, lapack.spotrs) if single else (lapack.dpotrf, lapack.dpotrs)
        shifted = spare if single and spare is not None else np.empty(gram.shape, rights[single].dtype)
        np.copyto(shifted, gram)
        shifted.flat[:: len(shifted) + 1] += (penalty * ridge).astype(shifted.dtype)
        # The transposed view is in the order that LAPACK works in: nothing is copied.
        factor, failed = factorise(shifted.T, lower=1, overwrite_a=1, clean=0)
        if failed:
            raise DataError(
                f"the features are too nearly dependent for the penalty {penalty:g}.",
                "Use larger penalties, such as penalties=(0.1, 1.0, 10.0).",
            )
        yield solve(factor, rights[single], lower=1)[0].astype(np.float32)


def _add_outer(matrix: Floats, vector: Floats, factor: float) -> Floats:
    """Add factor * vector vector' to a symmetric matrix, in place."""
    from scipy.linalg.blas import sger

    single = vector.astype(np.float32)
    # The transposed view is in the order that BLAS works in: it is changed, not copied.
    sger(factor, single, single, a=matrix.T, overwrite_x=0, overwrite_y=0, overwrite_a=1)
    return matrix


def _scale(variance: Floats) -> Floats:
    """Standard deviations; 1 for a feature that is constant, whose weight then stays 0."""
    deviation = np.sqrt(np.asarray(variance, np.float64))
    return np.where(deviation > 0, deviation, 1.0)
