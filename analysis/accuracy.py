"""How often the model is right, by sample, minimal pair and set, and what a constant answer would get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError, SpecificationError
from mechanistic.store.reader import group
from mechanistic.store.schema import CORRECT, STATUS

from .intervals import wilson_interval
from .minimal_pairs import OPPOSITES, minimal_pairs, texts
from .splits import row_labels, split_names

UNITS = ("individual", "pair", "set")
_OPTIONAL = ("group", "subject", "object", "relation", "image_name", "status", "sample_id")
Units = Sequence[NDArray[np.int64]]


def accuracy(
    run: xr.DataTree | xr.Dataset,
    *,
    by: str | None = None,
    scored: Literal["answer", "logits"] = "answer",
    level: float = 0.95,
    opposites: Mapping[str, str] = OPPOSITES,
) -> xr.Dataset:
    """Share of samples, minimal pairs and minimal-pair sets that are right; of a pair or set, all of them.

    In a complete run of N samples in sets of four there are N/2 pairs and N/4 sets, as What'sUp counts them.
    Samples that failed, have no known answer or were cut off are in no denominator, nor is a pair or set that
    lacks one of its samples: they are counted in `left_out`. One tried again with success counts once.

    Parameters
    ----------
    run
        A run, or its samples table.
    by
        A column of the samples, such as relation. Pairs and sets without one value of it are left out.
    scored
        "answer": the stored score of the generated answer, which counts exact options. "logits": whether the
        right option has the highest logit of the options; unscored where an option has none.
    opposites
        Which answers make a pair.

    Returns
    -------
    accuracy, accuracy_low, accuracy_high ([by,] unit), float64, shares from 0 to 1.
        With Wilson's interval; NaN where there is nothing to count. `unit` is individual, pair or set.
    majority_accuracy ([by,] unit), float64.
        The same for a model that always gives the answer that is right most often in the whole run.
    chance_accuracy ([by,] unit), float64.
        The same, expected, for a guess among the options of each sample.
    n, left_out ([by,] unit), int64.
        Units counted; samples that are in none of them.

    Raises
    ------
    DimensionError      the samples lack a column.
    SpecificationError  `scored` or `level` is not one of its values.

    References
    ----------
    Kamath, Hessel and Chang (2023), What's "up" with vision-language models?, EMNLP.
    """
    samples = _samples_of(run, by, scored)
    known, right = _scores(samples, scored)
    answers = texts(samples["answer"])
    majority = _most_common(answers[known])
    kinds = (right, answers == majority, _chance(samples))
    found = minimal_pairs(samples, opposites)
    units = {
        "individual": [np.array([row]) for row in np.flatnonzero(known)],
        "pair": [pair for pair in found.pairs if known[pair].all()],
        "set": [each for each in found.sets if known[each].all()],
    }
    labels = None if by is None else row_labels(samples[by])
    names = [None] if labels is None else split_names(samples[by], labels)
    parts = []
    for name in names:
        inside = np.ones(len(answers), bool) if labels is None else labels == name
        parts.append(_summary([_within(units[unit], inside) for unit in UNITS], kinds, inside, level))
    result = parts[0] if by is None else xr.concat(parts, by).assign_coords({by: names})
    return result.assign_attrs(
        majority_answer=majority,
        scored=scored,
        level=level,
        failed=int(_failed(samples).sum()),
        unscored=int((~known & ~_failed(samples)).sum()),
    )


def accuracy_lines(result: xr.Dataset) -> list[tuple[str, str]]:
    """Each unit that was counted: its accuracy as a person reads it, with interval and baselines.

    Parameters
    ----------
    result
        From `accuracy` without `by`.
    """
    lines = []
    for unit in UNITS:
        here = {str(name): float(value) for name, value in result.sel(unit=unit).data_vars.items()}
        if not here["n"]:
            continue
        baseline = f"always {result.attrs['majority_answer']!r} {here['majority_accuracy']:.1%}"
        if not np.isnan(here["chance_accuracy"]):
            baseline += f", guessing {here['chance_accuracy']:.1%}"
        lines.append(
            (
                "accuracy" if unit == "individual" else f"{unit} accuracy",
                f"{here['accuracy']:.1%} ({here['accuracy_low']:.1%} to {here['accuracy_high']:.1%}, "
                f"n {here['n']:.0f}); {baseline}",
            )
        )
    return lines


def _summary(
    units: Sequence[Units],
    kinds: tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]],
    inside: NDArray[np.bool_],
    level: float,
) -> xr.Dataset:
    right, constant, chance = (np.array([_share(each, kind) for each in units]) for kind in kinds)
    count = np.array([len(each) for each in units], np.int64)
    covered = np.array([sum(len(rows) for rows in each) for each in units], np.int64)
    low, high = wilson_interval(right, count, level=level)
    columns: dict[str, Any] = {
        "accuracy": right,
        "accuracy_low": low,
        "accuracy_high": high,
        "majority_accuracy": constant,
        "chance_accuracy": chance,
        "n": count,
        "left_out": int(inside.sum()) - covered,
    }
    return xr.Dataset(
        {name: ("unit", values) for name, values in columns.items()}, {"unit": np.array(UNITS, object)}
    )


def _share(units: Units, probability: NDArray[Any]) -> float:
    """Mean over units of the probability that all their samples are right; NaN without units."""
    if not len(units):
        return float("nan")
    return float(np.mean([probability[rows].astype(np.float64).prod() for rows in units]))


def _within(units: Units, inside: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    return [rows for rows in units if inside[rows].all()]


def _scores(samples: xr.Dataset, scored: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which samples have a score, and which are right."""
    if scored == "answer":
        correct = samples["correct"].values
        return (correct != CORRECT["unscored"]) & ~_failed(samples), correct == CORRECT["correct"]
    index = samples["answer_index"].values
    logits = samples["option_logits"].values.astype(np.float64)
    offered = texts(samples["options"]) != ""
    known = (index >= 0) & ~_failed(samples) & ~(np.isnan(logits) & offered).any(axis=1)
    logits = np.where(offered, logits, -np.inf)
    best = logits.max(axis=1, keepdims=True)
    # An option that shares the highest logit with another has not been chosen.
    chosen = np.where((logits == best).sum(axis=1) == 1, logits.argmax(axis=1), -1)
    return known, known & (chosen == index)


def _chance(samples: xr.Dataset) -> NDArray[np.float64]:
    offered = (texts(samples["options"]) != "").sum(axis=1)
    return np.where(offered > 0, 1 / np.maximum(offered, 1), np.nan)


def _failed(samples: xr.Dataset) -> NDArray[np.bool_]:
    if "status" not in samples:
        return np.zeros(samples.sizes["sample"], bool)
    failed: NDArray[np.bool_] = samples["status"].values == STATUS["failed"]
    return failed


def _most_common(answers: NDArray[Any]) -> str:
    """The most frequent answer, the first in the alphabet of several."""
    counts = Counter(answers.tolist())
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""


def _samples_of(run: xr.DataTree | xr.Dataset, by: str | None, scored: str) -> xr.Dataset:
    """The columns that are needed, read."""
    if scored not in ("answer", "logits"):
        raise SpecificationError(f"scored is {scored!r}.", "Use scored='answer' or scored='logits'.")
    table = run if isinstance(run, xr.Dataset) else group(run, "samples")
    needed = [
        "answer",
        "options",
        *(["correct"] if scored == "answer" else ["answer_index", "option_logits"]),
    ]
    needed += [by] if by is not None else []
    held = [str(name) for name, column in table.variables.items() if column.dims[:1] == ("sample",)]
    absent = [name for name in needed if name not in held]
    if absent:
        raise DimensionError(
            f"these samples have no column '{absent[0]}'; they have {', '.join(held)}.",
            "Give a run, or its samples table: accuracy(open_run(PATH)).",
        )
    wanted = [*needed, *(name for name in _OPTIONAL if name in held)]
    return _without_retried(table[list(dict.fromkeys(wanted))].load())


def _without_retried(samples: xr.Dataset) -> xr.Dataset:
    """Without the failed rows that a later row with the same id made good: it stands for both."""
    failed = _failed(samples)
    if "sample_id" not in samples or not failed.any():
        return samples
    names = texts(samples["sample_id"])
    return samples.isel(sample=np.flatnonzero(~(failed & np.isin(names, names[~failed]))))
