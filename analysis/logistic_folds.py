"""Multinomial logistic regression over folds by L-BFGS: one pass serves every fold and labelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .logistic_curvature import Blocks, Curvature
from .penalty_choice import FoldedFit, fold_pairs
from .probe_design import ProbeDesign

Floats = NDArray[np.float64]

STEPS = 2000
# Rows whose scores are held at once.
_ROWS = 2048


@dataclass(frozen=True)
class LogisticProblem:
    """Models (m), each trained on the rows of its folds: mean cross-entropy + penalty / 2 |standardised w|^2.

    `blocks` gives (first row, features (row, d)) anew for each pass; `trained` (m, fold) says which folds a
    model sees; `labellings` how many labellings of the design it fits, the truth first.
    """

    blocks: Blocks
    design: ProbeDesign
    trained: NDArray[np.bool_]
    labellings: int
    mean: Floats
    scale: Floats
    count: Floats
    curvature: Curvature

    @property
    def columns(self) -> int:
        return self.labellings * sum(self.design.sizes)

    def solve(self, penalty: Floats, start: Floats | None) -> Floats:
        """Weights and intercepts (d + 1, m, column) in standard units, for penalties (m, column).

        In single precision first, then on from there in double.
        """
        shape = (len(self.mean) + 1, len(self.trained), self.columns)
        found = np.zeros(shape) if start is None else start
        for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-5)):
            found = self._descend(penalty, found, dtype, tolerance)
        return found

    def _descend(self, penalty: Floats, start: Floats, dtype: Any, tolerance: float) -> Floats:
        """L-BFGS on weights that are scaled by the expected curvature, where all directions are alike."""
        from scipy.optimize import minimize

        scale = self.curvature.scale(penalty, dtype)

        def objective(flat: Floats) -> tuple[float, Floats]:
            loss, slope = self.loss(scale.weights(flat.reshape(start.shape)), penalty, dtype)
            return loss, scale.slope(slope).ravel()

        options = {"maxiter": STEPS, "maxfun": 2 * STEPS, "gtol": tolerance, "ftol": 1e-13, "maxcor": 20}
        first = scale.scaled(start).ravel()
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
        if dtype == np.float64 and (found.nit >= STEPS or np.abs(found.jac).max() > 1e-3):
            raise DataError(
                f"logistic regression did not settle in {found.nit} steps.",
                "Use larger penalties, such as penalties=(0.01, 0.1), or method='ridge'.",
            )
        return scale.weights(np.asarray(found.x).reshape(start.shape))

    def plain(self, standard: Floats) -> tuple[Floats, Floats]:
        """Weights (d, m, column) and intercepts (m, column) in the units of the features."""
        weights = standard[:-1] / self.scale[:, :, None]
        return weights, standard[-1] - np.einsum("dm,dmc->mc", self.mean, weights)

    def loss(self, standard: Floats, penalty: Floats, dtype: Any = np.float64) -> tuple[float, Floats]:
        """The sum of the objectives, and its slope; products are taken in `dtype`."""
        weights, shift = self.plain(standard)
        wide = weights.reshape(len(weights), -1).astype(dtype)
        slope, offset = np.zeros(wide.shape), np.zeros_like(shift)
        total = 0.5 * float((penalty * (standard[:-1] ** 2).sum(axis=0)).sum())
        for rows, features in self.pieces(dtype):
            share = (self.trained[:, self.design.fold[rows]] / self.count[:, None]).T
            entropy, residual = self.entropy(features @ wide + shift.ravel().astype(dtype), rows)
            total += float(np.einsum("nm,nmp->", share, entropy))
            residual *= share[:, :, None].astype(dtype)
            slope += features.T @ residual.reshape(len(features), -1)
            offset += residual.sum(axis=0)
        # The features were not standardised: what that does to scores, and so to slopes, is linear.
        inner = (slope.reshape(weights.shape) - self.mean[:, :, None] * offset) / self.scale[:, :, None]
        return total, np.concatenate([inner + penalty * standard[:-1], offset[None]])

    def pieces(self, dtype: Any = np.float64) -> Iterator[tuple[slice, NDArray[Any]]]:
        for start, block in self.blocks():
            for first in range(0, len(block), _ROWS):
                piece = block[first : first + _ROWS]
                yield slice(start + first, start + first + len(piece)), piece.astype(dtype, copy=False)

    def entropy(self, scores: Floats, rows: slice) -> tuple[Floats, Floats]:
        """-log p of the labels (row, m, labelling * target), and p - label (row, m, column)."""
        scores = scores.reshape(len(scores), len(self.trained), self.labellings, -1)
        codes = self.design.codes[rows, : self.labellings]
        entropy = np.empty((*scores.shape[:3], codes.shape[2]), scores.dtype)
        first = 0
        for target, size in enumerate(self.design.sizes):
            part = scores[..., first : first + size]
            part -= part.max(axis=-1, keepdims=True)
            code = np.broadcast_to(codes[:, None, :, target, None], (*part.shape[:3], 1))
            at_label = np.take_along_axis(part, code, axis=-1)[..., 0]
            np.exp(part, out=part)
            norm = part.sum(axis=-1, keepdims=True)
            entropy[..., target] = np.log(norm[..., 0]) - at_label
            part /= norm
            part -= np.arange(size) == code
            first += size
        shape = (len(scores), len(self.trained), -1)
        return entropy.reshape(shape), scores.reshape(shape)


def fit_logistic_folds(blocks: Blocks, design: ProbeDesign, penalties: Sequence[float]) -> FoldedFit:
    """Fit for every held-out fold and all rows; the penalty is chosen inside the training folds.

    As in `fit_folds`, but by cross-entropy, and once for the true labels: the shuffled and control labels of
    a fold get the same penalty.
    """
    moments = _fold_moments(blocks, design)
    curvature = Curvature.of(blocks, design)
    penalty = _choose(blocks, design, moments, penalties, curvature)
    trained = np.vstack([~np.eye(design.folds, dtype=bool), np.ones((1, design.folds), bool)])
    problem = _problem(blocks, design, trained, design.codes.shape[1], moments, curvature)
    spread = np.tile(np.repeat(penalty, design.sizes, axis=1), problem.labellings)
    weights, intercept = problem.plain(problem.solve(spread, None))
    return FoldedFit(weights.transpose(1, 0, 2).astype(np.float32), intercept, spread)


def _choose(
    blocks: Blocks,
    design: ProbeDesign,
    moments: tuple[Floats, Floats, Floats],
    penalties: Sequence[float],
    curvature: Curvature,
) -> Floats:
    """The penalty (fold + 1, target) with the least cross-entropy, see `fit_folds`."""
    targets = len(design.targets)
    if len(penalties) == 1:
        return np.full((design.folds + 1, targets), float(penalties[0]))
    pairs = fold_pairs(design.folds)
    trained = np.array([[fold not in pair for fold in range(design.folds)] for pair in pairs])
    problem = _problem(blocks, design, trained, 1, moments, curvature)
    said = np.zeros((len(penalties), design.folds, targets))
    found: Floats | None = None
    for place in np.argsort(penalties)[::-1]:
        found = problem.solve(np.full((len(pairs), problem.columns), float(penalties[place])), found)
        weights, shift = problem.plain(found)
        for rows, features in problem.pieces():
            scores = features @ weights.reshape(len(weights), -1) + shift.ravel()
            entropy, _ = problem.entropy(scores, rows)
            for number, (first, second) in enumerate(pairs):
                for held_out, partner in ((first, second), (second, first)):
                    here = design.fold[rows] == partner
                    said[place, held_out] += entropy[here, number].sum(axis=0)
    every = np.concatenate([said, said.sum(axis=1, keepdims=True)], axis=1)
    chosen: Floats = np.asarray(penalties, np.float64)[every.argmin(axis=0)]
    return chosen


def _fold_moments(blocks: Blocks, design: ProbeDesign) -> tuple[Floats, Floats, Floats]:
    """Counts (fold,), and means and mean squares about them (fold, d)."""
    count, mean, square = np.zeros(design.folds), np.zeros(1), np.zeros(1)
    for start, block in blocks():
        if not count.any():
            mean, square = np.zeros((2, design.folds, block.shape[1]))
        fold = design.fold[start : start + len(block)]
        for number in np.unique(fold):
            own = block[fold == number].astype(np.float64)
            total = count[number] + len(own)
            shift = own.mean(axis=0) - mean[number]
            spread = ((own - own.mean(axis=0)) ** 2).sum(axis=0)
            square[number] += spread + shift**2 * count[number] * len(own) / total
            mean[number] += shift * len(own) / total
            count[number] = total
    return count, mean, square


def _problem(
    blocks: Blocks,
    design: ProbeDesign,
    trained: NDArray[np.bool_],
    labellings: int,
    moments: tuple[Floats, Floats, Floats],
    curvature: Curvature,
) -> LogisticProblem:
    """The problem on features standardised over each model's own training rows."""
    count, mean, square = moments
    rows = trained @ count
    centre = (trained @ (mean * count[:, None])) / rows[:, None]
    spread = np.stack(
        [
            (square[own] + count[own, None] * (mean[own] - middle) ** 2).sum(axis=0)
            for own, middle in zip(trained, centre, strict=True)
        ]
    )
    deviation = np.sqrt(spread / rows[:, None])
    scale = np.where(deviation > 0, deviation, 1.0)
    return LogisticProblem(blocks, design, trained, labellings, centre.T, scale.T, rows, curvature)
