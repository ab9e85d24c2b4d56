"""The rows of a batch, cut into those of its samples, and put behind the rows that a run has already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mechanistic.store import GroupSchema
from mechanistic.store.growing import Values

from .tables import Rows


def split_rows(rows: Rows, samples: int, groups: Sequence[GroupSchema]) -> list[Rows]:
    """The rows of each of a batch's `samples`, as views; labels and pointers count from its own 0."""
    edges = {group.path: _edges(rows[group.path], group, samples) for group in groups if group.path in rows}
    targets = _pointers(groups)
    for (path, _), target in targets.items():
        if target != "samples" and target in rows:
            lengths = np.maximum(rows[path]["length"], 0)
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            edges[target] = ends[edges[path]]
    pieces = []
    for sample in range(samples):
        piece: dict[str, Mapping[str, Values]] = {}
        for group in groups:
            if group.path not in rows:
                continue
            first, last = (int(edge) for edge in edges[group.path][sample : sample + 2])
            piece[group.path] = {
                array.name: _cut(rows[group.path][array.name], array.dims.index(group.axis), first, last)
                for array in group.arrays
            }
        pieces.append(_moved(piece, targets, {path: -int(edges[path][sample]) for path in edges}))
    return pieces


def place_rows(rows: Rows, before: Mapping[str, int], groups: Sequence[GroupSchema]) -> Rows:
    """The rows of one sample, for a run whose groups have `before` rows already."""
    return _moved(rows, _pointers(groups), before)


def lengths(rows: Rows, groups: Sequence[GroupSchema]) -> dict[str, int]:
    """How many rows each group gets of these."""
    found = {}
    for group in groups:
        if group.path in rows:
            array = group.arrays[0]
            values = rows[group.path][array.name]
            found[group.path] = len(values[0]) if array.dims.index(group.axis) else len(values)
    return found


def _edges(columns: Mapping[str, Values], group: GroupSchema, samples: int) -> NDArray[np.int64]:
    steps = np.arange(samples + 1)
    if "sample_index" in columns:
        return np.searchsorted(columns["sample_index"], steps)
    # Groups that others point into get theirs from the pointers.
    return steps


def _pointers(groups: Sequence[GroupSchema]) -> dict[tuple[str, str], str]:
    return {
        (group.path, array.name): str(array.attrs["points_into"])
        for group in groups
        for array in group.arrays
        if "points_into" in array.attrs
    }


def _cut(values: Values, axis: int, first: int, last: int) -> Values:
    return [layer[first:last] for layer in values] if axis else values[first:last]


def _moved(rows: Rows, pointers: Mapping[tuple[str, str], str], by: Mapping[str, int]) -> Rows:
    moved = {path: dict(columns) for path, columns in rows.items()}
    for (path, name), target in pointers.items():
        if path in moved:
            values = np.asarray(moved[path][name])
            shift = np.asarray(by.get(target, 0), values.dtype)
            moved[path][name] = np.where(values < 0, values, values + shift)
    return moved
