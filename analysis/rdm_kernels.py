"""Dissimilarities between blocks of patterns, as matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

# Of a symmetric block only the tiles on and above the diagonal are multiplied.
TILE = 512


@dataclass(frozen=True)
class Patterns:
    """Patterns made ready so that one matrix product gives their dissimilarities.

    values (partition, condition, feature): one partition unless cross-validated; `lengths` (condition): the
    product of each pattern with itself.
    """

    values: NDArray[Any]
    lengths: NDArray[Any]

    @property
    def others(self) -> NDArray[Any]:
        """What each partition is multiplied with: the sum of the others, over the number of pairs."""
        partitions = len(self.values)
        if partitions == 1:
            return self.values
        total = self.values.sum(axis=0)
        return np.asarray((total - self.values) / self.values.dtype.type(partitions * (partitions - 1)))


def correlation_patterns(patterns: NDArray[Any], layer: int, names: NDArray[Any]) -> Patterns:
    """Centre each pattern (condition, feature) over its features and scale it to length 1.

    Raises
    ------
    DataError  a pattern is the same in all features, so that no correlation with it exists.
    """
    centred = patterns - patterns.mean(axis=1, keepdims=True, dtype=np.float64).astype(patterns.dtype)
    squares = np.einsum("cf,cf->c", centred, centred)
    flat = np.flatnonzero(squares <= (1e-6 * np.abs(patterns).max(axis=1)) ** 2 * patterns.shape[1])
    if flat.size:
        raise DataError(
            f"the pattern of condition {str(names[flat[0]])!r} is the same in all features of layer {layer}.",
            "It correlates with nothing: leave it out, or use metric='euclidean'.",
        )
    centred /= np.sqrt(squares)[:, None]
    return Patterns(centred[None], np.ones(len(centred), centred.dtype))


def distance_patterns(patterns: NDArray[Any], shift: NDArray[Any], whitener: NDArray[Any] | None) -> Patterns:
    """Patterns (partition, condition, feature) for squared distances.

    Parameters
    ----------
    shift
        (feature,), subtracted from all of them: it changes no distance, and keeps products small enough for
        single precision.
    whitener
        (feature, feature), see `noise_covariance.whitener`; None leaves features as they are.
    """
    values = patterns - shift.astype(patterns.dtype)
    if whitener is not None:
        values = values @ whitener.astype(patterns.dtype)
    ready = Patterns(values, np.empty(0))
    return Patterns(values, np.einsum("pcf,pcf->c", values, ready.others))


def correlation_block(first: Patterns, second: Patterns, same: bool) -> NDArray[Any]:
    """1 - r (condition of first, condition of second), 0 to 2; symmetric and 0 on its diagonal if `same`."""

    def finish(tile: NDArray[Any], rows: slice, columns: slice) -> None:
        np.subtract(1, tile, out=tile)
        np.clip(tile, 0, 2, out=tile)

    return _tiles(first, second, same, finish)


def distance_block(first: Patterns, second: Patterns, same: bool) -> NDArray[Any]:
    """Squared distances for each feature (condition of first, condition of second).

    Not negative, unless cross-validated: then they are unbiased, and so may be. Symmetric and 0 on its
    diagonal if `same`.
    """
    cross_validated, width = len(first.values) > 1, first.values.shape[2]

    def finish(tile: NDArray[Any], rows: slice, columns: slice) -> None:
        tile *= -2
        tile += first.lengths[rows, None] + second.lengths[None, columns]
        tile /= width
        if not cross_validated:
            np.maximum(tile, 0, out=tile)

    return _tiles(first, second, same, finish)


def _tiles(
    first: Patterns, second: Patterns, same: bool, finish: Callable[[NDArray[Any], slice, slice], None]
) -> NDArray[Any]:
    """Products of all pairs, each tile finished in place; of a symmetric block the upper half is mirrored."""
    others = second.others
    rows, columns = first.values.shape[1], others.shape[1]
    if same and len(others) == 1:
        # The product of a matrix and its own transpose is symmetric, and BLAS computes half of it.
        result = np.asarray(first.values[0] @ first.values[0].T)
        finish(result, slice(None), slice(None))
        np.fill_diagonal(result, 0)
        return result
    result = np.empty((rows, columns), first.values.dtype)
    step = TILE if same else max(1, rows)
    for start in range(0, rows, step):
        piece = slice(start, min(start + step, rows))
        onward = slice(start if same else 0, columns)
        tile = result[piece, onward]
        np.matmul(first.values[0, piece], others[0, onward].T, out=tile)
        for partition in range(1, len(others)):
            tile += first.values[partition, piece] @ others[partition, onward].T
        finish(tile, piece, onward)
        if same:
            height = tile.shape[0]
            corner = np.triu(tile[:, :height], 1)
            tile[:, :height] = corner + corner.T
            result[piece.stop :, piece] = tile[:, height:].T
    return result
