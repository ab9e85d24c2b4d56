"""Ridge regression over folds, from sums that one pass over the features accumulates.

Every target is a column: +1 or -1 for a class, the value itself where it is continuous, for the true labels
and for every shuffled copy at once. All that fitting, and the choice of the penalty, needs of a fold is its
size, sums and products X'X, X'Y, Y'Y (`FoldSums`), and those of a union of folds are their sums, so no row is
looked at twice. With fewer rows than features the same solution comes from the row-by-row products instead
(`RowRidge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .penalty_choice import Floats, Linear

# Below this share of the trace a penalty leaves a condition number that float32 cannot solve.
SINGLE_PRECISION = 2e-6


@dataclass(frozen=True)
class FoldSums:
    """Sums and products of features (d) and targets (c) over some rows, about a centre that all folds share.

    About a common centre they add up, and can be taken away, as they are; a centre near the means keeps
    float32 products exact enough. Of the symmetric `features` only the upper triangle counts: completing it
    takes a third of the time that making it does.
    """

    centre: tuple[Floats, Floats]
    count: int
    feature_sum: Floats
    target_sum: Floats
    features: Floats
    cross: Floats
    targets: Floats

    @classmethod
    def of(cls, features: Floats, targets: Floats, centre: tuple[Floats, Floats]) -> FoldSums:
        """Of rows (n, d) and targets (n, c)."""
        from scipy.linalg.blas import ssyrk

        x = np.subtract(features, centre[0], dtype=np.float32)
        y = np.subtract(targets, centre[1]).astype(np.float32)
        # The transposed view is in the order that BLAS works in, and its lower triangle is our upper one.
        products = ssyrk(1.0, x.T, lower=1).T if len(x) else np.zeros((x.shape[1],) * 2, np.float32)
        with_ones = np.column_stack([y, np.ones(len(y), np.float32)])
        cross = (x.T @ with_ones).astype(np.float64)
        squares = np.einsum("nc,nc->c", y, y, dtype=np.float64)
        target_sum = y.sum(axis=0, dtype=np.float64)
        return cls(centre, len(x), cross[:, -1], target_sum, products, cross[:, :-1], squares)

    def __add__(self, other: FoldSums) -> FoldSums:
        """Of the union of rows."""
        own, more = list(vars(self).values())[1:], list(vars(other).values())[1:]
        return FoldSums(self.centre, *(a + b for a, b in zip(own, more, strict=True)))

    def centred(self) -> Floats:
        """X'X about the mean of these rows."""
        return _add_outer(self.features.copy(), self.feature_sum / self.count, -self.count)


def rough_centre(features: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """About the means of the features, in float32 as what is centred, and of the targets: of a few rows."""
    some = slice(None, None, -(-len(features) // 512))
    return features[some].mean(axis=0, dtype=np.float64).astype(np.float32), targets[some].mean(axis=0)


@dataclass(frozen=True)
class MomentRidge:
    """The problem as the sums of each fold: for more rows than features, in any number of blocks."""

    parts: Sequence[FoldSums]

    @property
    def folds(self) -> int:
        return len(self.parts)

    @cached_property
    def products(self) -> Floats:
        """X'X of all rows."""
        return np.asarray(reduce(np.add, [part.features for part in self.parts]))

    @cached_property
    def scratch(self) -> Floats:
        # New memory costs more than the arithmetic done in it; a layer is fitted by one thread.
        return np.empty_like(self.products)

    def path(self, held_out: Sequence[int], penalties: Sequence[float]) -> MomentPath:
        """Penalties are on standardised features: (X'X + n a diag(s^2)) w = X'y in the units of X."""
        train = [part for fold, part in enumerate(self.parts) if fold not in held_out]
        count = sum(part.count for part in train)
        mean = np.sum([part.feature_sum for part in train], axis=0) / count
        target_mean = np.sum([part.target_sum for part in train], axis=0) / count
        gram = self.scratch
        first, *others = [self.parts[fold].features for fold in held_out] or [np.zeros(1, np.float32)]
        np.subtract(self.products, first, out=gram)
        for other in others:
            gram -= other
        _add_outer(gram, mean, -count)
        cross = np.sum([part.cross for part in train], axis=0) - np.outer(mean * count, target_mean)
        squares = np.diag(gram).astype(np.float64)
        # Taking folds away leaves a constant feature a trace of variance; its weight must be exactly 0.
        constant = squares <= 1e-6 * np.diag(self.products)
        if constant.any():
            squares[constant] = count
            cross[constant] = gram[constant] = gram[:, constant] = 0
        weights = np.stack(list(_solve_path(gram, cross, squares, penalties)))
        return MomentPath(self, weights, target_mean - np.einsum("d,pdc->pc", mean, weights))


@dataclass(frozen=True)
class MomentPath:
    """weights (penalty, d, c), intercept (penalty, c) about the common centre."""

    problem: MomentRidge
    weights: NDArray[np.float32]
    intercept: Floats

    def squared_error(self, fold: int) -> Floats:
        from scipy.linalg.blas import ssymm

        part, offset = self.problem.parts[fold], self.intercept
        explained = np.stack(
            [np.einsum("dc,dc->c", w, ssymm(1.0, part.features.T, w, lower=1)) for w in self.weights]
        )
        cross = np.einsum("pdc,dc->pc", self.weights, part.cross.astype(np.float32))
        mean = np.einsum("pdc,d->pc", self.weights, part.feature_sum.astype(np.float32))
        return np.asarray(
            part.targets
            - 2 * (cross + offset * part.target_sum - offset * mean)
            + explained
            + part.count * offset**2
        )

    def pick(self, best: NDArray[np.int64]) -> Linear:
        columns, (features, targets) = np.arange(len(best)), self.problem.parts[0].centre
        weights = self.weights[best, :, columns].T
        return Linear(weights, self.intercept[best, columns] + targets - features.astype(float) @ weights)


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
    gram: Floats, right: Floats, ridge: Floats, penalties: Sequence[float]
) -> Iterator[NDArray[np.float32]]:
    """Solve (gram + penalty diag(ridge)) w = right; in float64 where the penalty is too small for float32.

    The last solution is worked out in `gram` itself.
    """
    from scipy.linalg import lapack

    trace = float((np.diag(gram) / ridge).sum())
    spare: dict[Any, Floats] = {}
    for penalty in penalties:
        dtype: Any = np.float32 if penalty > SINGLE_PRECISION * trace else np.float64
        factorise, solve = lapack.get_lapack_funcs(("potrf", "potrs"), dtype=dtype)
        if penalty == penalties[-1] and gram.dtype == dtype:
            shifted = gram
        else:
            shifted = spare.setdefault(dtype, np.empty(gram.shape, dtype))
            np.copyto(shifted, gram)
        shifted.flat[:: len(shifted) + 1] += (penalty * ridge).astype(dtype)
        # The transposed view is in the order that LAPACK works in: nothing is copied.
        factor, failed = factorise(shifted.T, lower=1, overwrite_a=1, clean=0)
        if failed:
            raise DataError(
                f"the features are too nearly dependent for the penalty {penalty:g}.",
                "Use larger penalties, such as penalties=(0.1, 1.0, 10.0).",
            )
        yield solve(factor, np.asarray(right, dtype, order="F"), lower=1)[0].astype(np.float32)


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
