"""The labels of a probe: of its rows, copies shuffled within sets, and labels drawn for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .splits import row_labels, split_names


def labels_of_rows(rows: xr.Dataset, target: str, axis: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The labels, and which rows have one: not "", unscored, -1 or NaN.

    Raises
    ------
    DimensionError  there is no such label on `axis`.
    """
    if target not in rows.variables or rows[target].dims != (axis,):
        held = [str(name) for name, coord in rows.coords.items() if coord.dims == (axis,)]
        raise DimensionError(
            f"these rows have no label '{target}'; they have {', '.join(held)}.",
            "The target is a column of samples/ or a label of the tokens: relation, correct, patch_row, ...",
        )
    labels = row_labels(rows[target])
    if labels.dtype.kind == "f":
        return labels.astype(np.float64), np.isfinite(labels)
    missing = np.isin(labels, ["", "unscored"]) if labels.dtype.kind == "U" else labels == -1
    return labels, ~missing


def number_labels(
    column: xr.DataArray, labels: NDArray[Any], least: int = 2
) -> tuple[NDArray[Any], list[Any]]:
    """Each label as the number of its class, and the classes; a continuous label as itself, and none.

    Raises
    ------
    DataError  fewer classes than `least`, or continuous labels that are all the same.
    """
    classes = split_names(column, labels)
    if len(classes) < (2 if labels.dtype.kind == "f" else least):
        found = f"one class, {classes[0]!r}," if classes else "none"
        raise DataError(
            f"'{column.name}' has {found} in {len(labels)} rows.",
            "A probe needs two classes: choose another target, or capture more samples.",
        )
    if labels.dtype.kind == "f":
        return labels, []
    number = {name: place for place, name in enumerate(classes)}
    return np.array([number[label] for label in labels.tolist()], np.int64), classes


def shuffled_rows(
    truth: NDArray[Any], samples: NDArray[np.int64], sets: NDArray[np.int64], repetitions: int, seed: int
) -> tuple[NDArray[np.int64], str]:
    """Which row's labels each row gets (row, repetition), permuted at the level that the labels vary at.

    Labels that differ between the samples of a set are permuted among these; labels of whole sets among all
    sets; labels that differ between the tokens of a sample among its tokens. What else is alike in a set or a
    sample thus stays as it is. `truth` (row, target) moves as whole rows.
    """
    if _constant_within(truth, sets):
        units, blocks, name = sets, np.zeros_like(sets), "sets among all sets"
    elif _constant_within(truth, samples):
        units, blocks, name = samples, sets, "samples within their set"
    else:
        units, blocks, name = np.arange(len(truth)), samples, "tokens within their sample"
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    block = blocks[first]
    in_order = np.argsort(block, kind="stable")
    rng = np.random.default_rng(seed)
    copies = np.empty((len(truth), repetitions), np.int64)
    for repetition in range(repetitions):
        permuted = np.empty_like(first)
        permuted[in_order] = first[np.lexsort((rng.random(len(first)), block))]
        copies[:, repetition] = permuted[unit]
    return copies, name


def control_rows(
    values: NDArray[Any], fold: NDArray[np.int16], name: str, repetitions: int, seed: int
) -> NDArray[np.int64]:
    """Which row's labels each row gets (row, repetition): one row drawn at random for each value.

    Raises
    ------
    DataError  no value is in two folds: what is learnt of it could not show.
    """
    words, word = np.unique(values, return_inverse=True)
    pairs = np.unique(np.column_stack([word, fold]), axis=0)
    if np.bincount(pairs[:, 0]).max(initial=0) < 2:
        raise DataError(
            f"no value of '{name}' is in two folds, so no probe could learn a control task over it.",
            "Choose what recurs in several sets: token_text, subject, object, patch_row, ...",
        )
    drawn = np.random.default_rng([seed, 1]).integers(len(values), size=(len(words), repetitions))
    return np.asarray(drawn[word])


def _constant_within(truth: NDArray[Any], blocks: NDArray[np.int64]) -> bool:
    pairs = np.unique(np.column_stack([blocks, truth.reshape(len(blocks), -1)]), axis=0)
    return len(pairs) == len(np.unique(blocks))


def as_names(target: str | Sequence[str]) -> tuple[str, ...]:
    """The targets as a tuple, whether one name or several came."""
    return (target,) if isinstance(target, str) else tuple(target)
