"""A dataset read from files when it is opened: its samples, its problems, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError

from .annotation_files import file_sha256
from .dataset import Sample
from .dataset_problems import Problem, kinds_of, problem_report

# To be raised with every change of a loader that alters a sample: stored runs name it in their dataset hash.
LOADER_VERSION = 1

# An answer that is always at one place gives itself away; fewer samples than this say nothing.
_ENOUGH = 8


class SampleList:
    """Samples in file order. Images are paths, opened when a sample is captured and not before.

    `problems` are the rows that are not as they should be, each with what was made of it; a sample's own are
    named in its column `problem`.
    """

    def __init__(
        self,
        name: str,
        samples: Sequence[Sample],
        *,
        problems: Sequence[Problem] = (),
        files: Sequence[Path] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = name
        self._samples = tuple(samples)
        self.problems = (*problems, *_always_at_one_place(self._samples))
        self.files = tuple(files)
        self.settings = dict(settings or {})

    @property
    def name(self) -> str:
        return self._name

    @cached_property
    def _fingerprint(self) -> str:
        specification = {
            "dataset": self.name,
            "loader": LOADER_VERSION,
            "files": [file_sha256(path) for path in self.files],
            "settings": self.settings,
            "samples": len(self),
        }
        return hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the question and annotation files (images not included) and every option.

        Where the files lie plays no part in it.
        """
        return self._fingerprint

    def problem_report(self) -> str:
        """What is wrong with the files, for a person; "" if nothing is."""
        return problem_report(self.name, len(self), self.problems)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)


def first_rows(name: str, held: int, num_samples: int | None) -> int:
    """How many rows to take from the start of a file that has `held`.

    Raises
    ------
    DatasetError    it has fewer than were asked for, or none were.
    """
    if num_samples is None:
        return held
    if not 1 <= num_samples <= held:
        raise DatasetError(
            f"{name} has {held} rows; {num_samples} were asked for.",
            f"Use --num-samples (num_samples) from 1 to {held}, or leave it out for all.",
        )
    return num_samples


def mark_problems(
    samples: Sequence[Sample], rows: Sequence[int], problems: Sequence[Problem]
) -> list[Sample]:
    """Give every sample the column `problem`: the kinds of problem that its row has, "" for none."""
    by_row: dict[int, list[Problem]] = {}
    for problem in problems:
        by_row.setdefault(problem.row, []).append(problem)
    return [
        replace(sample, extra={**sample.extra, "problem": kinds_of(by_row.get(row, []), row)})
        for sample, row in zip(samples, rows, strict=True)
    ]


def _always_at_one_place(samples: Sequence[Sample]) -> list[Problem]:
    places = [
        sample.answer_index for sample in samples if len(sample.options) > 1 and sample.answer_index >= 0
    ]
    if len(places) < _ENOUGH or len(set(places)) > 1:
        return []
    what = f"the right option is number {places[0] + 1} in every sample, so its place gives it away"
    return [Problem(-1, "order", what)]
