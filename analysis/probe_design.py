"""What a probe is trained on and tested with: rows, labels, folds that keep sets whole, shuffled labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError, SpecificationError
from mechanistic.store.schema import STATUS

from .splits import row_labels, split_names
from .token_selection import token_axis


@dataclass(frozen=True)
class ProbeDesign:
    """Labels and folds of the rows that a probe uses.

    `rows` index the token (or sample) axis; `codes` (row, 1 + repetitions) number the classes, the true
    labels first and then their shuffled copies; `sets` and `samples` say where a row belongs, `fold` which
    fold tests it; `excluded` rows had no label; `shuffled` says what was permuted within what.
    """

    rows: NDArray[np.int64]
    classes: list[Any]
    codes: NDArray[np.int16]
    sets: NDArray[np.int64]
    samples: NDArray[np.int64]
    fold: NDArray[np.int16]
    folds: int
    excluded: int
    shuffled: str


def probe_design(rows: xr.Dataset, target: str, *, folds: int, repetitions: int, seed: int) -> ProbeDesign:
    """Lay out a probe for the label `target` of the rows of `rows`.

    Rows without a label ("", unscored, -1) and rows of failed samples are left out and counted. Samples with
    one `group` label are a set and stay in one fold; a sample without one is a set of its own.

    Raises
    ------
    DimensionError      there is no such label.
    DataError           the label is continuous, has one class, or a class with fewer sets than folds.
    SpecificationError  fewer than three folds, or no repetitions.
    """
    _check_options(folds, repetitions)
    axis, samples = _axis_and_samples(rows)
    labels, usable = _labels(rows, target, axis)
    if "status" in rows.variables:
        usable &= np.asarray(rows["status"].values) == STATUS["ok"]
    kept = np.flatnonzero(usable)
    labels, samples = labels[kept], samples[kept]
    classes = split_names(rows[target], labels)
    if len(classes) < 2:
        raise DataError(
            f"'{target}' has {f'one class, {classes[0]!r},' if classes else 'none'} in {len(kept)} rows.",
            "A probe needs two classes: choose another target, or capture more samples.",
        )
    number = {name: place for place, name in enumerate(classes)}
    truth = np.array([number[label] for label in labels.tolist()], np.int64)
    sets = _sets(rows, kept, samples)
    fold = _fold_of_row(truth, sets, classes, folds, seed)
    copies, shuffled = _shuffled(truth, samples, sets, repetitions, seed)
    codes = np.column_stack([truth, copies]).astype(np.int16)
    return ProbeDesign(kept, classes, codes, sets, samples, fold, folds, len(usable) - len(kept), shuffled)


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


def _labels(rows: xr.Dataset, target: str, axis: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The labels, and which rows have one."""
    if target not in rows.variables or rows[target].dims != (axis,):
        held = [str(name) for name, coord in rows.coords.items() if coord.dims == (axis,)]
        raise DimensionError(
            f"these rows have no label '{target}'; they have {', '.join(held)}.",
            "The target is a column of samples/ or a label of the tokens: relation, correct, patch_row, ...",
        )
    labels = row_labels(rows[target])
    if labels.dtype.kind == "f":
        raise DataError(
            f"'{target}' is continuous; a probe of classes needs categories.",
            "Cut it into classes, and attach them as a column: rows.assign_coords(...).",
        )
    missing = np.isin(labels, ["", "unscored"]) if labels.dtype.kind == "U" else labels == -1
    return labels, ~missing


def _sets(rows: xr.Dataset, kept: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the sets; a sample without a group label is one by itself."""
    if "group" not in rows.variables:
        return np.unique(samples, return_inverse=True)[1]
    group = np.asarray(rows["group"].values)[kept].astype(object).astype(str)
    names = np.where(group == "", np.char.add("\0", samples.astype(str)), group)
    return np.unique(names, return_inverse=True)[1]


def _fold_of_row(
    truth: NDArray[np.int64], sets: NDArray[np.int64], classes: list[Any], folds: int, seed: int
) -> NDArray[np.int16]:
    """Deal sets to folds so that the classes are as even as they can be."""
    from sklearn.model_selection import StratifiedGroupKFold

    for code, name in enumerate(classes):
        held = len(np.unique(sets[truth == code]))
        if held < folds:
            raise DataError(
                f"class {name!r} occurs in {held} sets, but each of {folds} folds must test it.",
                f"Use folds={max(3, held)}, or capture more samples."
                if held >= 3
                else "Capture more samples.",
            )
    fold = np.full(len(truth), -1, np.int16)
    dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(dealer.split(truth[:, None], truth, sets)):
        fold[test] = number
    return fold


def _shuffled(
    truth: NDArray[np.int64], samples: NDArray[np.int64], sets: NDArray[np.int64], repetitions: int, seed: int
) -> tuple[NDArray[np.int64], str]:
    """Copies of the labels (row, repetition), permuted at the level they vary at, within the level above.

    Labels that differ between the samples of a set are permuted among these; labels of whole sets among all
    sets; labels that differ between the tokens of a sample among its tokens. What else is alike in a set or a
    sample thus stays as it is.
    """
    if _constant_within(truth, sets):
        units, blocks, name = sets, np.zeros_like(sets), "sets among all sets"
    elif _constant_within(truth, samples):
        units, blocks, name = samples, sets, "samples within their set"
    else:
        units, blocks, name = np.arange(len(truth)), samples, "tokens within their sample"
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    label, block = truth[first], blocks[first]
    in_order = np.argsort(block, kind="stable")
    rng = np.random.default_rng(seed)
    copies = np.empty((len(truth), repetitions), np.int64)
    for repetition in range(repetitions):
        permuted = np.empty_like(label)
        permuted[in_order] = label[np.lexsort((rng.random(len(label)), block))]
        copies[:, repetition] = permuted[unit]
    return copies, name


def _constant_within(truth: NDArray[np.int64], blocks: NDArray[np.int64]) -> bool:
    return len(np.unique(np.column_stack([blocks, truth]), axis=0)) == len(np.unique(blocks))
