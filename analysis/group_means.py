"""Sums and means of groups of rows, in double precision.

Of 128 rows at a time the sum is in the precision of the rows, single at least: it is a matrix product, which
takes a third of the time, and is off by 128 roundings at most, of the values that are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from .finite import require_finite
from .representation_rows import finite_rows, row_chunks
from .single_precision import to_single

Ints = NDArray[np.int64]

_PIECE = 128


def group_means(
    blocks: Sequence[Any], starts: Sequence[int], samples: Ints, layer: int, code: Ints, groups: int
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


def group_sums(values: da.Array, layers: Sequence[int], samples: Ints, code: Ints, groups: int) -> da.Array:
    """Sums (layer, group, feature) over rows (layer, row, feature), lazy, of any number of rows.

    For few groups: a block of rows has a sum for each. `code` is the group of each row, -1 of none; computed,
    it raises DataError as above.
    """
    values = row_chunks(values)
    numbers = da.from_array(np.asarray(layers), chunks=(values.chunks[0],), name=False)
    owner, group = (da.from_array(each, chunks=(values.chunks[1],), name=False) for each in (samples, code))
    of_blocks = da.blockwise(
        _block_sums,
        (0, 1, 3, 2),
        values,
        (0, 1, 2),
        numbers,
        (0,),
        owner,
        (1,),
        group,
        (1,),
        groups=groups,
        new_axes={3: groups},
        adjust_chunks={1: 1},
        align_arrays=False,
        dtype=np.float64,
        meta=np.empty((0,) * 4),
    )
    summed: da.Array = of_blocks.sum(axis=1)
    return summed


def _block_sums(
    values: NDArray[Any], layer: Ints, samples: Ints, code: Ints, groups: int
) -> NDArray[np.float64]:
    """(1, 1, group, feature) of a block of one layer."""
    total = np.zeros((groups, values.shape[2]))
    held = code >= 0
    rows, code = (values[0], code) if held.all() else (values[0][held], code[held])
    with np.errstate(invalid="ignore", over="ignore"):
        _add(total, rows, code)
    if not np.isfinite(total).all():
        require_finite(rows, samples[held], layer[0])
        # Finite values, whose sum is more than single precision holds.
        total[...] = 0
        _add(total, rows.astype(np.float64), code)
    return total[None, None]


def _add(total: NDArray[np.float64], rows: NDArray[Any], code: Ints) -> None:
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        piece = piece if piece.dtype == np.float64 else to_single(piece)
        present, local = np.unique(code[start : start + _PIECE], return_inverse=True)
        members = np.arange(len(present))[:, None] == local
        total[present] += members.astype(piece.dtype) @ piece
