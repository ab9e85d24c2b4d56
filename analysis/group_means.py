"""Means of groups of rows, summed in double precision over the blocks of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .representation_rows import finite_rows


def group_means(
    blocks: Sequence[Any],
    starts: Sequence[int],
    samples: NDArray[np.int64],
    layer: int,
    code: NDArray[np.int64],
    groups: int,
) -> NDArray[np.float64]:
    """Means (group, feature) over the rows of one layer; `code` is the group of each, `samples` its sample.

    Raises
    ------
    DataError  a value is not finite; names layer and sample.
    """
    total = np.zeros((groups, 0))
    for start, block in zip(starts, blocks, strict=False):
        rows = finite_rows(block, samples[start:], layer)
        if not total.shape[1]:
            total = np.zeros((groups, rows.shape[1]))
        _add(total, rows, code[start : start + len(rows)])
    total /= np.bincount(code, minlength=groups)[:, None]
    return total


def _add(total: NDArray[np.float64], rows: NDArray[Any], code: NDArray[np.int64]) -> None:
    from scipy.sparse import csr_array

    present, first, local = np.unique(code, return_index=True, return_inverse=True)
    if len(present) == len(code):
        total[present] += rows[first]
        return
    members = (local, np.arange(len(code)))
    indicator = csr_array((np.ones(len(code)), members), shape=(len(present), len(code)))
    total[present] += indicator @ rows.astype(np.float64)
