"""The numerical side of a probe: blocks (1, row, feature) of a layer in, held-out predictions out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .probe_design import ProbeDesign
from .ridge_folds import FoldedFit, FoldMoments, MomentRidge, RowRidge, fit_folds


@dataclass(frozen=True)
class ProbeFit:
    """Probes of one layer: one for each fold, and one of all rows in the units of the features."""

    fit: FoldedFit
    classes: int

    @property
    def direction(self) -> NDArray[np.float32]:
        """(class, feature)."""
        return np.ascontiguousarray(self.fit.weights[-1][:, : self.classes].T)

    @property
    def offset(self) -> NDArray[np.float64]:
        """(class,)."""
        return np.asarray(self.fit.intercept[-1][: self.classes])

    @property
    def strength(self) -> NDArray[np.float64]:
        """The penalty, a scalar array."""
        return np.asarray(self.fit.penalty[-1][0])


def moments_of_block(
    block: NDArray[Any], design: ProbeDesign, start: int, layer: int, total: list[FoldMoments] | None
) -> list[FoldMoments]:
    """Add the rows of one block to the moments of their folds."""
    features = block[0]
    _require_finite(features, design, start, layer)
    rows = slice(start, start + len(features))
    fold, targets = design.fold[rows], _targets(design, rows)
    parts = [FoldMoments.of(features[fold == k], targets[fold == k]) for k in range(design.folds)]
    return parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]


def fit_moments(moments: list[FoldMoments], design: ProbeDesign, penalties: tuple[float, ...]) -> ProbeFit:
    """Fit one layer from the moments of its folds."""
    classes = len(design.classes)
    return ProbeFit(fit_folds(MomentRidge(moments), penalties, classes), classes)


def fit_block(block: NDArray[Any], design: ProbeDesign, penalties: tuple[float, ...], layer: int) -> ProbeFit:
    """Fit one layer from all of its rows: from their moments, or row by row where features are more."""
    features = block[0]
    if features.shape[0] > features.shape[1]:
        return fit_moments(moments_of_block(block, design, 0, layer, None), design, penalties)
    _require_finite(features, design, 0, layer)
    classes = len(design.classes)
    problem = RowRidge(features, _targets(design, slice(None)), design.fold, design.folds)
    return ProbeFit(fit_folds(problem, penalties, classes), classes)


def predict_again(block: Any, probe: ProbeFit, design: ProbeDesign, start: int) -> NDArray[np.int16]:
    """`predict_block` of a dask block that is read here and now, and dropped afterwards."""
    return predict_block(block.compute(scheduler="synchronous"), probe, design, start)


def predict_block(block: NDArray[Any], probe: ProbeFit, design: ProbeDesign, start: int) -> NDArray[np.int16]:
    """The class (row, labelling) with the largest score by the probe that was not trained on the row."""
    features = block[0]
    fold = design.fold[start : start + len(features)]
    predicted = np.empty((len(features), design.codes.shape[1]), np.int16)
    for number in range(design.folds):
        rows = fold == number
        scores = features[rows].astype(np.float32) @ probe.fit.weights[number] + probe.fit.intercept[number]
        predicted[rows] = scores.reshape(len(scores), predicted.shape[1], probe.classes).argmax(axis=-1)
    return predicted


def fit_estimator(block: NDArray[Any], design: ProbeDesign, estimator: Any, layer: int) -> NDArray[np.int16]:
    """Held-out classes (row, labelling) from clones of a scikit-learn classifier."""
    from sklearn.base import clone

    features = block[0]
    _require_finite(features, design, 0, layer)
    predicted = np.empty(design.codes.shape, np.int16)
    for number in range(design.folds):
        test = design.fold == number
        for labelling, codes in enumerate(design.codes.T):
            fitted = clone(estimator).fit(features[~test], codes[~test])
            predicted[test, labelling] = fitted.predict(features[test])
    return predicted


def _targets(design: ProbeDesign, rows: slice) -> NDArray[np.float32]:
    """One column a labelling and class (row, labellings * classes): 1 where the class applies, else -1."""
    codes = design.codes[rows]
    signs = np.eye(len(design.classes), dtype=np.float32) * 2 - 1
    return signs[codes].reshape(len(codes), -1)


def _require_finite(features: NDArray[Any], design: ProbeDesign, start: int, layer: int) -> None:
    bad = ~np.isfinite(features).all(axis=-1)
    if bad.any():
        samples = np.unique(design.samples[start : start + len(features)][bad])
        named = ", ".join(map(str, samples[:5].tolist())) + (", ..." if len(samples) > 5 else "")
        raise DataError(
            f"layer {layer} holds NaN or infinity in {bad.sum()} rows, of sample {named}.",
            "Capture these samples again (half precision overflows at 65504), or leave them out.",
        )
