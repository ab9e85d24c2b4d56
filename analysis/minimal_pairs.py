"""Minimal pairs and sets among samples: the same question of images that differ in the answer alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

# Each answer and the one that turns it round.
OPPOSITES: Mapping[str, str] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "top": "bottom",
    "bottom": "top",
    "on": "under",
    "under": "on",
    "front": "behind",
    "behind": "front",
    "in front of": "behind",
    "true": "false",
    "false": "true",
    "yes": "no",
    "no": "yes",
}


@dataclass(frozen=True)
class MinimalPairs:
    """Numbers of samples that belong together: `pairs` of opposite answers, `sets` of all the options."""

    pairs: tuple[NDArray[np.int64], ...]
    sets: tuple[NDArray[np.int64], ...]


def minimal_pairs(samples: xr.Dataset, opposites: Mapping[str, str] = OPPOSITES) -> MinimalPairs:
    """Find the complete pairs and sets.

    Candidates are the samples of one `group` that ask about the same subject and object. Two of them with
    opposite answers, or with opposite relations where answers have no opposite, are a pair; all of them are a
    set if each option that they offer is the answer of exactly one. Where an answer is unknown or occurs
    twice, which sample belongs to which cannot be told, and several questions about one image are not a
    minimal pair: these are in neither.

    Parameters
    ----------
    samples
        Columns answer and options; group (without it there are no pairs), subject, object, relation and
        image_name where the run has them.
    """
    buckets: dict[tuple[str, ...], list[int]] = {}
    names = [name for name in ("group", "subject", "object") if name in samples.variables]
    if "group" not in names:
        return MinimalPairs((), ())
    columns = [texts(samples[name]) for name in names]
    for row, key in enumerate(zip(*columns, strict=True)):
        if key[0]:
            buckets.setdefault(key, []).append(row)
    answers = [_fold(answer) for answer in texts(samples["answer"])]
    named = texts(samples["relation"]) if "relation" in samples.variables else answers
    relations = [_fold(relation) for relation in named]
    words = [
        answer if answer in opposites or relation not in opposites else relation
        for answer, relation in zip(answers, relations, strict=True)
    ]
    options = texts(samples["options"])
    images = texts(samples["image_name"]) if "image_name" in samples.variables else None
    pairs, sets = [], []
    for rows in buckets.values():
        by_answer = {answers[row]: row for row in rows}
        one_image = images is not None and len(set(images[rows])) < len(rows)
        if len(by_answer) < len(rows) or "" in by_answer or one_image:
            continue
        by_word = {words[row]: row for row in rows}
        turned = {
            tuple(sorted((row, by_word[opposites[word]])))
            for word, row in by_word.items()
            if opposites.get(word) in by_word and len(by_word) == len(rows)
        }
        pairs += [np.array(pair) for pair in sorted(turned)]
        offered = {_fold(option) for row in rows for option in options[row] if option}
        if len(rows) > 1 and offered == set(by_answer):
            sets.append(np.array(rows))
    return MinimalPairs(tuple(pairs), tuple(sets))


def texts(column: xr.DataArray) -> NDArray[np.str_]:
    """A column of text as fixed-width strings, which stored text does not become directly."""
    return column.values.astype(object).astype(str)


def _fold(answer: str) -> str:
    return answer.replace("_", " ").strip().casefold()
