"""Similarity of some matrices with one, its permutation test, its bootstrap interval: one task's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .rdm_bootstrap import resampled_similarities
from .rdm_similarity import Method, Prepared, prepare, similarity
from .representation_rows import open_block

STATISTICS = ("similarity", "p_value", "similarity_low", "similarity_high")


@dataclass(frozen=True)
class Inference:
    """How two matrices are compared, and how often conditions are permuted and drawn again."""

    method: Method
    permutations: int = 0
    resamples: int = 0
    level: float = 0.95
    seed: int = 0


def check_options(inference: Inference) -> None:
    """Raises SpecificationError for an unknown method, negative numbers, a level not between 0 and 1."""
    if inference.method not in get_args(Method):
        raise SpecificationError(
            f"There is no method '{inference.method}'.", f"Choose {', '.join(get_args(Method))}."
        )
    for name, number in (("permutations", inference.permutations), ("resamples", inference.resamples)):
        if number < 0:
            raise SpecificationError(f"{name} is {number}.", f"Give 0 for none, usually {name}=1000.")
    if not 0 < inference.level < 1:
        raise SpecificationError(
            f"level is {inference.level}.", "Give the coverage as a share, such as level=0.95."
        )


def compare_matrices(
    firsts: Sequence[Any], names: Sequence[str], second: Any, other: str, inference: Inference
) -> NDArray[np.float64]:
    """Statistics (first, statistic) of some matrices with one; those not asked for are NaN.

    Raises
    ------
    DataError  a value is not finite, or the pairs of a matrix are all alike; names the matrix.
    """
    matrix, prepared = prepared_matrix(open_block(second), other, inference.method)
    table = np.full((len(firsts), len(STATISTICS)), np.nan)
    for row, first, name in zip(table, firsts, names, strict=True):
        own, prepared_own = prepared_matrix(open_block(first), name, inference.method)
        row[0] = similarity(prepared_own, prepared, inference.method)
        if inference.permutations:
            row[1] = _p_value(prepared_own, prepared, row[0], inference)
        if inference.resamples:
            row[2:] = _interval(own, matrix, inference)
    return table


def prepared_matrix(matrix: NDArray[Any], name: str, method: Method) -> tuple[NDArray[Any], Prepared]:
    """A matrix and its prepared form, both checked."""
    bad = np.argwhere(~np.isfinite(matrix))
    if bad.size:
        raise DataError(
            f"the dissimilarities of {name} hold {len(bad)} values that are not finite, the first of "
            f"conditions {bad[0][0]} and {bad[0][1]}.",
            "Leave those conditions out: rdm.isel(condition=keep, other=keep).",
        )
    prepared = prepare(matrix, method)
    if np.isnan(prepared.square[0, -1]):
        raise DataError(
            f"the dissimilarities of {name} are the same for all pairs: nothing can be compared with them.",
            "Choose a label that differs between conditions, or leave this layer out.",
        )
    return matrix, prepared


def _p_value(first: Prepared, second: Prepared, observed: float, inference: Inference) -> float:
    rng = np.random.default_rng([inference.seed, 0])
    reached = sum(
        # Orders that leave the matrix as it is must count, whatever their rounding.
        similarity(first, second, inference.method, rng.permutation(len(second.square))) >= observed - 1e-9
        for _ in range(inference.permutations)
    )
    return (1 + reached) / (1 + inference.permutations)


def _interval(first: NDArray[Any], second: NDArray[Any], inference: Inference) -> tuple[float, float]:
    count = len(first)
    rng = np.random.default_rng([inference.seed, 1])
    draws = rng.multinomial(count, np.full(count, 1 / count), size=inference.resamples)
    values = resampled_similarities(first, second, inference.method, draws)
    if not np.isfinite(values).any():
        return np.nan, np.nan
    low, high = np.nanquantile(values, [0.5 - inference.level / 2, 0.5 + inference.level / 2])
    return float(low), float(high)
