"""What the curvature of cross-entropy looks like before a step is taken, from one product of the features.

L-BFGS needs many steps where directions differ in curvature by orders of magnitude, as those of residual
streams do. The Hessian of multinomial logistic regression is at most (1/2) X'X / n a class (Boehning 1992,
Annals of the Institute of Statistical Mathematics 44, 197), and has its shape: in coordinates in which
c X'X / n + penalty is the identity, a dozen steps do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .probe_design import ProbeDesign
from .ridge_folds import FoldSums, rough_centre

Floats = NDArray[np.float64]
Blocks = Callable[[], Iterator[tuple[int, NDArray[Any]]]]


@dataclass(frozen=True)
class Curvature:
    """The correlations of the features (d, d), upper triangle; None for more features than rows.

    `share` is the curvature that is expected of cross-entropy in the scores: that of guessing among the
    classes, to within a factor.
    """

    correlations: NDArray[np.float32] | None
    share: float
    factors: dict[float, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Blocks, design: ProbeDesign) -> Curvature:
        """From one pass over the rows."""
        share = 1 / min(design.sizes)
        total: FoldSums | None = None
        for _, block in blocks():
            if len(design.rows) <= block.shape[1]:
                return cls(None, share)
            none = np.zeros((len(block), 1), np.float32)
            part = FoldSums.of(block, none, total.centre if total else rough_centre(block, none))
            total = part if total is None else total + part
        if total is None:
            return cls(None, share)
        products = total.centred()
        deviation = np.sqrt(np.diag(products) / total.count)
        inverse = (1 / np.where(deviation > 0, deviation, 1)).astype(np.float32)
        correlations = products * inverse * inverse[:, None] / np.float32(total.count)
        return cls(correlations.astype(np.float32), share)

    def scale(self, penalty: Floats, dtype: Any) -> Scale:
        """The change of coordinates for penalties (m, column), computed in `dtype`."""
        held = []
        for value in np.unique(penalty):
            columns = np.flatnonzero(penalty.ravel() == value)
            factor = self._factor(float(value))
            held.append((columns, None if factor is None else np.asarray(factor, dtype)))
        return Scale(held, dtype)

    def _factor(self, penalty: float) -> NDArray[np.float32] | None:
        """Lower triangular L with L L' = share X'X / n + penalty."""
        from scipy.linalg import lapack

        if self.correlations is None:
            return None
        if penalty not in self.factors:
            matrix = self.share * self.correlations
            # Never so small that single precision fails: this only scales the steps.
            floor = max(penalty, 1e-5 * float(np.trace(matrix)))
            matrix.flat[:: len(matrix) + 1] += floor
            self.factors[penalty] = lapack.spotrf(matrix.T, lower=1, overwrite_a=1, clean=0)[0]
        return self.factors[penalty]


@dataclass(frozen=True)
class Scale:
    """Factors L of some columns each: weights w = L'^-1 u for the scaled weights u."""

    factors: list[tuple[NDArray[np.int64], NDArray[Any] | None]]
    dtype: Any

    def weights(self, scaled: Floats) -> Floats:
        """Weights and intercepts (d + 1, m, column) of scaled ones."""
        return self._solve(scaled, transposed=1)

    def slope(self, slope: Floats) -> Floats:
        """The slope by scaled weights, from that by weights."""
        return self._solve(slope, transposed=0)

    def scaled(self, weights: Floats) -> Floats:
        """Undo `weights`."""
        from scipy.linalg.blas import dtrmm

        flat = weights.reshape(len(weights), -1).copy()
        for columns, factor in self.factors:
            if factor is not None:
                flat[:-1, columns] = dtrmm(1.0, factor, flat[:-1, columns], lower=1, trans_a=1)
        return flat.reshape(weights.shape)

    def _solve(self, values: Floats, transposed: int) -> Floats:
        from scipy.linalg.blas import dtrsm, strsm

        solve = strsm if self.dtype == np.float32 else dtrsm
        flat = values.reshape(len(values), -1).copy()
        for columns, factor in self.factors:
            if factor is not None:
                right = flat[:-1, columns].astype(self.dtype)
                flat[:-1, columns] = solve(1.0, factor, right, lower=1, trans_a=transposed)
        return flat.reshape(values.shape)
