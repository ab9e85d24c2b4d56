"""The numerical side of a probe: blocks (1, row, unit, feature) of a layer in, held-out predictions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .finite import require_finite
from .logistic_folds import fit_logistic_folds
from .penalty_choice import FoldedFit, fit_folds
from .probe_design import ProbeDesign, RowLabels
from .ridge_folds import FoldSums, MomentRidge, RowRidge, rough_centre


@dataclass(frozen=True)
class LayerFit:
    """Probes of one layer: for each unit (head, or the residual) one a fold, and one of all rows."""

    units: Sequence[FoldedFit]
    sizes: tuple[int, ...]

    @property
    def direction(self) -> NDArray[np.float32]:
        """(unit, class, feature)."""
        return np.stack([fit.weights[-1][:, : sum(self.sizes)].T for fit in self.units])

    @property
    def offset(self) -> NDArray[np.float64]:
        """(unit, class)."""
        return np.stack([fit.intercept[-1][: sum(self.sizes)] for fit in self.units])

    @property
    def strength(self) -> NDArray[np.float64]:
        """The penalty (unit, target)."""
        firsts = np.cumsum([0, *self.sizes[:-1]])
        return np.stack([fit.penalty[-1][firsts] for fit in self.units])


def moments_of_block(
    block: NDArray[Any], design: ProbeDesign, start: int, layer: int, total: list[list[FoldSums]] | None
) -> list[list[FoldSums]]:
    """Add the rows of one block to the sums (unit, fold)."""
    features = block[0]
    rows = slice(start, start + len(features))
    require_finite(features, design.samples[rows], layer)
    targets = _targets(design, rows)
    of_fold = [np.flatnonzero(design.fold[rows] == number) for number in range(design.folds)]
    sums = []
    for unit, own in enumerate(features.swapaxes(0, 1)):
        centre = total[unit][0].centre if total else rough_centre(own, targets)
        parts = [FoldSums.of(own[rows], targets[rows], centre) for rows in of_fold]
        sums.append([a + b for a, b in zip(total[unit], parts, strict=True)] if total else parts)
    return sums


def fit_moments(moments: list[list[FoldSums]], design: ProbeDesign, penalties: tuple[float, ...]) -> LayerFit:
    """Fit one layer from the moments of its units and folds."""
    fits = [fit_folds(MomentRidge(folds), penalties, design.owner) for folds in moments]
    return LayerFit(fits, design.sizes)


def fit_block(block: NDArray[Any], design: ProbeDesign, penalties: tuple[float, ...], layer: int) -> LayerFit:
    """Fit one layer from all of its rows: from their moments, or row by row where features are more."""
    features = block[0]
    if features.shape[0] > features.shape[2]:
        return fit_moments(moments_of_block(block, design, 0, layer, None), design, penalties)
    require_finite(features, design.samples, layer)
    targets = _targets(design, slice(None))
    problems = [RowRidge(unit, targets, design.fold, design.folds) for unit in features.swapaxes(0, 1)]
    return LayerFit([fit_folds(problem, penalties, design.owner) for problem in problems], design.sizes)


def fit_logistic(
    read: Callable[[], Iterator[tuple[int, NDArray[Any]]]],
    units: int,
    design: ProbeDesign,
    penalties: tuple[float, ...],
    layer: int,
) -> LayerFit:
    """Fit one layer by L-BFGS over blocks (1, row, unit, feature) that `read` gives anew for each pass."""
    for start, block in read():
        require_finite(block[0], design.samples[start : start + block.shape[1]], layer)

    def of_unit(unit: int) -> Callable[[], Iterator[tuple[int, NDArray[Any]]]]:
        return lambda: ((start, block[0, :, unit]) for start, block in read())

    return LayerFit(
        [fit_logistic_folds(of_unit(unit), design, penalties) for unit in range(units)], design.sizes
    )


def predict_block(block: NDArray[Any], probe: LayerFit, design: ProbeDesign, start: int) -> NDArray[Any]:
    """What the probe that was not trained on a row says of it (row, unit, labelling, target)."""
    features = block[0]
    fold = design.fold[start : start + len(features)]
    predicted = np.empty((*features.shape[:2], *design.codes.shape[1:]), prediction_dtype(design))
    for number in range(design.folds):
        rows = np.flatnonzero(fold == number)
        for unit, fit in enumerate(probe.units):
            scores = features[rows, unit].astype(np.float32, copy=False) @ fit.weights[number]
            # In float64: a score in the units of a continuous target may be far from its intercept.
            predicted[rows, unit] = best_scores(scores + fit.intercept[number], design)
    return predicted


def best_scores(scores: NDArray[Any], labels: RowLabels) -> NDArray[Any]:
    """From scores (row, labelling * column) classes, or continuous values, (row, labelling, target)."""
    columns = sum(labels.sizes)
    scores = scores.reshape(len(scores), scores.shape[1] // columns, columns)
    if labels.continuous:
        return scores
    edges = np.cumsum([0, *labels.sizes])
    parts = [scores[..., a:b].argmax(axis=-1) for a, b in pairwise(edges)]
    return np.stack(parts, axis=-1)


def prediction_dtype(labels: RowLabels) -> Any:
    return np.float32 if labels.continuous else np.int16


def fit_estimator(block: NDArray[Any], design: ProbeDesign, estimator: Any, layer: int) -> NDArray[Any]:
    """Held-out predictions (row, unit, labelling, target) from clones of a scikit-learn estimator."""
    from sklearn.base import clone

    features = block[0]
    require_finite(features, design.samples, layer)
    predicted = np.empty((*features.shape[:2], *design.codes.shape[1:]), prediction_dtype(design))
    for number in range(design.folds):
        test = design.fold == number
        for unit, labelling, target in np.ndindex(*predicted.shape[1:]):
            codes = design.codes[:, labelling, target]
            fitted = clone(estimator).fit(features[~test, unit], codes[~test])
            predicted[test, unit, labelling, target] = fitted.predict(features[test, unit])
    return predicted


def _targets(design: ProbeDesign, rows: slice) -> NDArray[Any]:
    """One column a labelling, target and class: 1 where the class applies, else -1; or continuous values."""
    codes = design.codes[rows]
    if design.continuous:
        return codes.reshape(len(codes), -1)
    signs = [np.eye(size, dtype=np.float32) * 2 - 1 for size in design.sizes]
    parts = [sign[codes[..., target]] for target, sign in enumerate(signs)]
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)
