"""A penalty for each held-out fold, chosen inside the training folds alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


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
class FoldedFit:
    """One model for each fold, fitted on the other folds, and one fitted on all of them.

    weights (fold + 1, d, c), intercept (fold + 1, c), penalty (fold + 1, c); the last entry is of all folds.
    """

    weights: NDArray[np.float32]
    intercept: NDArray[np.float64]
    penalty: NDArray[np.float64]


def fit_folds(problem: RidgeProblem, penalties: Sequence[float], owner: NDArray[np.int64]) -> FoldedFit:
    """Fit for every held-out fold, choosing the penalty inside the training folds alone.

    Folds are paired with their neighbours. Models trained on neither of a pair say with which penalty each is
    best predicted, and what the one says serves while the other is held out. The columns of one `owner` (a
    labelling of the rows) share a penalty; each shuffled copy of the labels chooses its own.
    """
    errors = penalty_errors(problem, penalties)
    sums = [*errors, np.sum(errors, axis=0)]
    models, chosen = [], []
    for number, error in enumerate(sums):
        best = _best(error, owner)
        model = _fit(problem, [number] if number < problem.folds else [], penalties, best)
        models.append(model)
        chosen.append(np.asarray(penalties, np.float64)[best])
    return FoldedFit(
        np.stack([model.weights for model in models]).astype(np.float32),
        np.stack([model.intercept for model in models]),
        np.stack(chosen),
    )


def fold_pairs(folds: int) -> list[tuple[int, int]]:
    """Disjoint neighbours; of an odd number of folds the last goes with the first."""
    pairs = [(first, first + 1) for first in range(0, folds - 1, 2)]
    return [*pairs, (folds - 1, 0)] if folds % 2 else pairs


def penalty_errors(problem: RidgeProblem, penalties: Sequence[float]) -> list[Floats]:
    """What the partners of each held-out fold say: squared errors (penalty, c) of models that saw neither."""
    said: list[Floats] = [np.zeros((1, 1))] * problem.folds
    if len(penalties) == 1:
        return said
    for first, second in fold_pairs(problem.folds):
        path = problem.path([first, second], penalties)
        said[first] = said[first] + path.squared_error(second)
        said[second] = said[second] + path.squared_error(first)
    return said


def _fit(
    problem: RidgeProblem, held_out: Sequence[int], penalties: Sequence[float], best: NDArray[np.int64]
) -> Linear:
    """The chosen models; penalties that no column chose are not fitted."""
    used, places = np.unique(best, return_inverse=True)
    return problem.path(held_out, [penalties[number] for number in used]).pick(places)


def _best(errors: Floats, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each target the number of its labelling's best penalty."""
    if len(errors) == 1:
        return np.zeros(len(owner), np.int64)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.asarray(np.add.reduceat(errors, starts, axis=1).argmin(axis=0)[owner])
