"""What a probe is trained on and tested with: rows, labels, folds that keep sets whole, controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError
from mechanistic.store.schema import STATUS

from .probe_labels import as_names, control_rows, labels_of_rows, number_labels, shuffled_rows
from .token_selection import token_axis


@dataclass(frozen=True)
class RowLabels:
    """The labelled rows of some data.

    `rows` index the token (or sample) axis; `truth` (row, target) numbers the classes of each target, or
    holds continuous values; `classes` are the names, empty for a continuous target; `sets` and `samples` say
    where a row belongs; `excluded` rows had no label or failed.
    """

    rows: NDArray[np.int64]
    targets: tuple[str, ...]
    classes: tuple[list[Any], ...]
    truth: NDArray[Any]
    sets: NDArray[np.int64]
    samples: NDArray[np.int64]
    excluded: int

    @property
    def continuous(self) -> bool:
        return not self.classes[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many columns of scores each target takes."""
        return tuple(max(1, len(names)) for names in self.classes)


@dataclass(frozen=True)
class ProbeDesign(RowLabels):
    """Labels, folds and controls of the rows that a probe uses.

    `codes` (row, labelling, target): the truth, its shuffled copies, then the copies of the control task;
    `fold` says which fold tests a row, `shuffled` what was permuted within what.
    """

    codes: NDArray[Any]
    fold: NDArray[np.int16]
    folds: int
    shuffled: str
    repetitions: int

    @property
    def owner(self) -> NDArray[np.int64]:
        """Which labelling and target (numbered through) each column of scores belongs to."""
        sizes = np.tile(self.sizes, self.codes.shape[1])
        return np.repeat(np.arange(len(sizes)), sizes)


def row_targets(rows: xr.Dataset, target: str | Sequence[str], least: int = 2) -> RowLabels:
    """The rows of `rows` that have the label, or all of the labels, `target`.

    Rows without a label ("", unscored, -1, NaN) and rows of failed samples are left out and counted. Samples
    with one `group` label are a set; a sample without one is a set of its own.

    Raises
    ------
    DimensionError      there is no such label.
    DataError           a label has fewer classes than `least`.
    SpecificationError  categorical and continuous labels together, or none.
    """
    names = as_names(target)
    axis, samples = _axis_and_samples(rows)
    columns = [labels_of_rows(rows, name, axis) for name in names]
    if len({labels.dtype.kind == "f" for labels, _ in columns}) != 1:
        raise SpecificationError(
            f"the targets {', '.join(names) or '()'} are not all classes or all continuous.",
            "Probe classes and continuous values one after the other.",
        )
    usable = np.logical_and.reduce([held for _, held in columns])
    if "status" in rows.variables:
        usable &= np.asarray(rows["status"].values) == STATUS["ok"]
    kept = np.flatnonzero(usable)
    pairs = [
        number_labels(rows[name], labels[kept], least)
        for name, (labels, _) in zip(names, columns, strict=True)
    ]
    truth = np.column_stack([numbers for numbers, _ in pairs])
    classes = tuple(held for _, held in pairs)
    sets = _sets(rows, kept, samples[kept])
    return RowLabels(kept, names, classes, truth, sets, samples[kept], len(usable) - len(kept))


def probe_design(
    rows: xr.Dataset,
    target: str | Sequence[str],
    *,
    folds: int,
    repetitions: int,
    seed: int,
    control: str | None = None,
) -> ProbeDesign:
    """Lay out a probe for the label `target` of the rows of `rows`, see `row_targets`; sets stay in one fold.

    Raises
    ------
    DimensionError      there is no such label.
    DataError           a class in fewer sets than folds, or fewer sets than folds; one class only; no
                        value of `control` is in two folds.
    SpecificationError  fewer than three folds, or no repetitions; targets of two kinds.
    """
    _check_options(folds, repetitions)
    held = row_targets(rows, target)
    fold = _fold_of_row(held, folds, seed)
    copies, shuffled = shuffled_rows(held.truth, held.samples, held.sets, repetitions, seed)
    sources = [np.arange(len(held.rows))[:, None], copies]
    if control is not None:
        axis, _ = _axis_and_samples(rows)
        values = labels_of_rows(rows, control, axis)[0][held.rows]
        sources.append(control_rows(values, fold, control, repetitions, seed))
    codes = held.truth[np.concatenate(sources, axis=1)]
    if not held.continuous:
        codes = codes.astype(np.int16)
    return ProbeDesign(
        **vars(held), codes=codes, fold=fold, folds=folds, shuffled=shuffled, repetitions=repetitions
    )


def _check_options(folds: int, repetitions: int) -> None:
    if folds < 3:
        raise SpecificationError(
            f"folds is {folds}.",
            "Use at least 3: the penalty is chosen by holding out one of the others again.",
        )
    if repetitions < 1:
        raise SpecificationError(f"repetitions is {repetitions}.", "The shuffled control needs at least one.")


def _axis_and_samples(rows: xr.Dataset) -> tuple[str, NDArray[np.int64]]:
    if "sample_index" in rows.variables:
        return token_axis(rows), np.asarray(rows["sample_index"].values).astype(np.int64)
    return "sample", np.arange(rows.sizes["sample"])


def _sets(rows: xr.Dataset, kept: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the sets; a sample without a group label is one by itself."""
    if "group" not in rows.variables:
        return np.unique(samples, return_inverse=True)[1]
    group = np.asarray(rows["group"].values)[kept].astype(object).astype(str)
    names = np.where(group == "", np.char.add("\0", samples.astype(str)), group)
    return np.unique(names, return_inverse=True)[1]


def _fold_of_row(held: RowLabels, folds: int, seed: int) -> NDArray[np.int16]:
    """Deal sets to folds, in turn, sets of one size and with the same classes evenly."""
    for column, classes in zip(held.truth.T, held.classes, strict=True):
        for code, name in enumerate(classes):
            _require_sets(held.sets[column == code], f"class {name!r} occurs in", folds)
    _require_sets(held.sets, "the rows are of", folds)
    rng = np.random.default_rng(seed)
    names, place = np.unique(held.sets, return_inverse=True)
    keys: list[NDArray[Any]] = [rng.random(len(names))]
    for column, classes in zip(held.truth.T, held.classes, strict=True):
        keys += [np.bincount(place[column == code], minlength=len(names)) for code in range(len(classes))]
    keys.append(np.bincount(place))
    fold = np.empty(len(names), np.int16)
    # Like sets lie side by side, so dealing them out in turn spreads them evenly.
    fold[np.lexsort(keys)] = np.arange(len(names)) % folds
    return fold[place]


def _require_sets(sets: NDArray[np.int64], what: str, folds: int) -> None:
    count = len(np.unique(sets))
    if count < folds:
        raise DataError(
            f"{what} {count} {'set' if count == 1 else 'sets'}, but each of {folds} folds must test it.",
            f"Use folds={count}, or capture more samples."
            if count >= 3
            else "Leave out the rows of so few sets, choose another target, or capture more samples.",
        )
