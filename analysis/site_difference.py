"""How far two arrays of the same rows are apart, in blocks of bounded bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray

from .representation_rows import UnreadBlock, open_block

Ints = NDArray[np.int64]
_PIECE = 1 << 17


@dataclass(frozen=True)
class Difference:
    """Of one layer: `largest` and its `worst` row, the largest value of the first run, cosines, sums.

    `unmatched` is a row where one run has a number and the other NaN or infinity, or -1.
    """

    largest: float = -1.0
    worst: int = -1
    scale: float = 0.0
    cosine: float = 0.0
    least: float = np.inf
    rows: int = 0
    square: float = 0.0
    energy: float = 0.0
    unmatched: int = -1

    def of(self, rows: Ints) -> Difference:
        """With the rows that its rows belong to."""
        worst, unmatched = (int(rows[row]) if row >= 0 else -1 for row in (self.worst, self.unmatched))
        return replace(self, worst=worst, unmatched=unmatched)

    def joined(self, other: Difference) -> Difference:
        """Of the rows of both; of equals the first counts."""
        ahead = self if self.largest >= other.largest else other
        return Difference(
            ahead.largest,
            ahead.worst,
            max(self.scale, other.scale),
            self.cosine + other.cosine,
            min(self.least, other.least),
            self.rows + other.rows,
            self.square + other.square,
            self.energy + other.energy,
            self.unmatched if self.unmatched >= 0 else other.unmatched,
        )


def layer_differences(
    first: Any, second: Any, rows: tuple[Ints, Ints], layers: list[tuple[int, int]], max_bytes: int
) -> list[Difference]:
    """Compare `first[l, rows]` with `second[m, rows]`, arrays (layer, row, ...), for each pair of layers.

    Values that are equal, NaN among them, differ by 0.
    """
    width = int(np.prod(first.shape[2:]))
    bound = max(1, max_bytes // max(1, width * (first.dtype.itemsize + second.dtype.itemsize)))
    spans = list(row_spans(*rows, bound))
    compare = delayed(_block, traverse=False, pure=False)
    waiting = [
        [compare(*_unread(first, second, rows, span, layer), span[0]) for span in spans] for layer in layers
    ]
    done = compute(*waiting)
    return [_joined(parts) for parts in done]


def row_spans(first: Ints, second: Ints, bound: int) -> Iterator[tuple[int, int]]:
    """Cut pairs of rows so that those of one span lie within `bound` rows of each other in both arrays."""
    ends = np.append(np.flatnonzero(np.diff(second) < 0) + 1, len(first))
    begin = 0
    for end in ends.tolist():
        while begin < end:
            reach = [np.searchsorted(rows[begin:end], rows[begin] + bound) for rows in (first, second)]
            stop = begin + int(min(reach))
            yield begin, stop
            begin = stop


def _unread(
    first: Any, second: Any, rows: tuple[Ints, Ints], span: tuple[int, int], layer: tuple[int, int]
) -> list[Any]:
    made: list[Any] = []
    for values, chosen, number in zip((first, second), rows, layer, strict=True):
        own = chosen[slice(*span)]
        made += [UnreadBlock(values[number, own[0] : own[-1] + 1]), own - own[0]]
    return made


def _block(first: UnreadBlock, here: Ints, second: UnreadBlock, there: Ints, start: int) -> Difference:
    values = [
        opened if len(opened) == len(rows) else opened[rows]
        for opened, rows in ((open_block(first), here), (open_block(second), there))
    ]
    flat = [array.reshape(len(array), -1) for array in values]
    step = max(1, _PIECE // max(1, flat[0].shape[1]))
    pieces = [
        _piece(flat[0][at : at + step], flat[1][at : at + step], start + at)
        for at in range(0, len(flat[0]), step)
    ]
    return _joined(pieces)


def _joined(parts: list[Difference]) -> Difference:
    total = Difference()
    for part in parts:
        total = total.joined(part)
    return total


def _piece(first: NDArray[Any], second: NDArray[Any], start: int) -> Difference:
    a, b = first.astype(np.float64), second.astype(np.float64)
    unmatched = -1
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    if not np.isfinite(apart).all():
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        strange = ~same & ~np.isfinite(apart)
        unmatched = start + int(np.argmax(strange.any(axis=1))) if strange.any() else -1
        left_out = ~np.isfinite(apart)
        for array in (a, b, apart):
            array[left_out] = 0
    largest = apart.max(axis=1)
    worst = int(largest.argmax())
    products = partial(np.einsum, "nf,nf->n")
    norms = products(a, a), products(b, b)
    cosine = _cosine(products(a, b), *norms)
    return Difference(
        float(largest[worst]),
        start + worst,
        float(np.abs(a).max()),
        float(cosine.sum()),
        float(cosine.min()),
        len(a),
        float(products(apart, apart).sum()),
        float(norms[0].sum()),
        unmatched,
    )


def _cosine(product: NDArray[Any], first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """1 where both are zero, 0 where one is."""
    norm = np.sqrt(first) * np.sqrt(second)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(product / norm, -1, 1)
    return np.asarray(np.where(norm > 0, cosine, (first == 0) & (second == 0)), np.float64)
