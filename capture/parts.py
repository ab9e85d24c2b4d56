"""One part of a job: a contiguous slice of the dataset, fixed in advance, written by one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechanistic.store.errors import UsageError
from mechanistic.store.parts import part_path, part_span


@dataclass(frozen=True)
class PartOf:
    """Part `index`, from 0, of `count`.

    Raises
    ------
    UsageError    there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"There is no part {self.index} of {self.count}.",
                f"Parts are counted from 0: --part 0 to --part {self.count - 1}.",
            )

    def span(self, samples: int) -> range:
        """The samples of the dataset that belong to it. UsageError if there are none."""
        span = part_span(samples, self.index, self.count)
        if not span:
            raise UsageError(
                f"{samples} samples in {self.count} parts leave part {self.index} empty.",
                f"Use --parts {samples} or fewer.",
            )
        return span

    def path(self, run: Path) -> Path:
        """Where it is written."""
        return Path(part_path(run, self.index))

    def attributes(self, samples: int) -> dict[str, Any]:
        """What the part's attribute `capture` says of it."""
        span = self.span(samples)
        return {"index": self.index, "of": self.count, "first_sample": span.start, "samples": len(span)}
