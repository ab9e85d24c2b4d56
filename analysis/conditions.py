"""Which rows are measurements of the same condition, and in which partition of the data each belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .probe_labels import labels_of_rows
from .representation_rows import sample_numbers
from .splits import row_labels, split_names


@dataclass(frozen=True)
class Conditions:
    """`code[i]` is the condition of row `rows[i]`; `labels` describe conditions; `excluded` rows had none."""

    rows: NDArray[np.int64]
    code: NDArray[np.int64]
    count: int
    labels: Mapping[str, NDArray[Any]]
    excluded: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many rows each condition has."""
        return np.bincount(self.code, minlength=self.count)

    @property
    def trivial(self) -> bool:
        """Every row is a condition of its own, in the order of the rows."""
        return self.count == len(self.rows) and bool((self.code == np.arange(self.count)).all())

    def name(self, place: int) -> str:
        return str(self.labels["condition"][place])

    def coordinates(self, axis: str = "condition", prefix: str = "") -> dict[str, Any]:
        """Coordinates for an axis of conditions."""
        named = {
            f"{prefix}{name}": (axis, values) for name, values in self.labels.items() if name != "condition"
        }
        return {axis: (axis, self.labels["condition"]), **named}


def conditions_of(rows: xr.DataArray, by: str | Sequence[str] | None) -> Conditions:
    """Group rows by the values of one or several labels; None makes each row a condition of its own.

    Conditions are sorted by label, an enumeration's in its own order. Rows without a label ("", unscored,
    -1, NaN) are left out and counted.

    Raises
    ------
    DimensionError  there is no such label.
    DataError       no row has a label.
    """
    axis = str(rows.dims[1])
    if by is None:
        return _each_row(rows, axis)
    names = [by] if isinstance(by, str) else list(by)
    table = rows.coords.to_dataset()
    found = [labels_of_rows(table, name, axis) for name in names]
    columns = [values for values, _ in found]
    usable = np.logical_and.reduce([known for _, known in found])
    kept = np.flatnonzero(usable)
    if not kept.size:
        raise DataError(
            f"none of {len(usable)} rows has a value of {', '.join(names)}.", "Choose another label."
        )
    combined = np.zeros(len(kept), np.int64)
    splits = []
    for name, values in zip(names, columns, strict=True):
        split = split_names(rows[name], values[kept])
        place = {value: number for number, value in enumerate(split)}
        combined *= len(split)
        combined += np.array([place[value] for value in values[kept].tolist()])
        splits.append(np.asarray(split))
    present, code = np.unique(combined, return_inverse=True)
    places = np.unravel_index(present, [len(split) for split in splits])
    labels: dict[str, NDArray[Any]] = {
        name: split[at] for name, split, at in zip(names, splits, places, strict=True)
    }
    joined = [" | ".join(map(str, values)) for values in zip(*labels.values(), strict=True)]
    labels["condition"] = labels[names[0]] if len(names) == 1 else np.array(joined)
    return Conditions(kept, code.astype(np.int64), len(present), labels, int((~usable).sum()))


def partition_codes(
    rows: xr.DataArray, conditions: Conditions, partitions: str | int, seed: int
) -> tuple[NDArray[np.int64], int]:
    """The partition of each row of `conditions`, and how many there are.

    Parameters
    ----------
    partitions
        A label of the rows; or a number of partitions to which the samples of each condition are dealt.

    Raises
    ------
    SpecificationError  fewer than two partitions.
    DataError           a condition has no row in some partition.
    """
    if isinstance(partitions, str):
        values = labels_of_rows(rows.coords.to_dataset(), partitions, str(rows.dims[1]))[0][conditions.rows]
        names, code = np.unique(values, return_inverse=True)
        count = len(names)
    else:
        names, count = np.arange(partitions), partitions
        code = _dealt(conditions, sample_numbers(rows)[conditions.rows], partitions, seed)
    if count < 2:
        raise SpecificationError(
            f"there {'is one partition' if count == 1 else 'are no partitions'}; cross-validation needs two.",
            "Name a label with at least two values, or give a number: partitions=2.",
        )
    cells = np.bincount(conditions.code * count + code, minlength=conditions.count * count)
    empty = np.flatnonzero(cells == 0)
    if empty.size:
        condition, partition = divmod(int(empty[0]), count)
        raise DataError(
            f"condition {conditions.name(condition)!r} has {conditions.sizes[condition]} rows, none in "
            f"partition {names[partition]}; {empty.size} such cells are empty.",
            "Every condition needs a row in each partition: use fewer partitions, or other conditions.",
        )
    return code.astype(np.int64), count


def _each_row(rows: xr.DataArray, axis: str) -> Conditions:
    count = rows.shape[1]
    labels = {
        str(name): row_labels(coord)
        for name, coord in rows.coords.items()
        if coord.dims == (axis,) and name not in ("condition", axis)
    }
    numbers = sample_numbers(rows)
    labels["condition"] = numbers if len(np.unique(numbers)) == count else np.arange(count)
    if axis in rows.coords:
        labels["condition"] = np.asarray(rows[axis].values)
    return Conditions(np.arange(count), np.arange(count), count, labels, 0)


def _dealt(
    conditions: Conditions, samples: NDArray[np.int64], partitions: int, seed: int
) -> NDArray[np.int64]:
    """Deal the samples of each condition to partitions in turn, in random order; their rows stay together."""
    rng = np.random.default_rng(seed)
    _, unit = np.unique(np.column_stack([conditions.code, samples]), axis=0, return_inverse=True)
    unit = unit.reshape(-1)
    units = int(unit.max(initial=-1)) + 1
    owner = np.empty(units, np.int64)
    owner[unit] = conditions.code
    order = np.lexsort((rng.random(units), owner))
    starts = np.searchsorted(owner[order], np.arange(conditions.count))
    turn = np.empty(units, np.int64)
    turn[order] = (np.arange(units) - starts[owner[order]]) % max(1, partitions)
    return turn[unit]
