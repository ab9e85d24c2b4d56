"""How far a sweep of forwards is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .progress import Progress, human_seconds


@dataclass
class ForwardProgress(Progress):
    """Counts forwards; the first line of a log comes after half a minute, so short sweeps say nothing."""

    unit: str = "forwards"

    def line(self) -> str:
        """The line as it is now."""
        state = self.state()
        left = human_seconds(state["seconds_left"]) if state["seconds_left"] is not None else "unknown"
        rate = f"{state['samples_per_second']:.1f} {self.unit}/s"
        return f"{self.done}/{self.total} {self.unit}  {rate}  {left} left"

    def step(self) -> None:
        """Count one forward."""
        self.advance(1, 0, lambda: 0)

    def skip(self, forwards: int) -> None:
        """Count forwards that were done before, which say nothing about the rate."""
        self.done += forwards
        self.first += forwards


@contextmanager
def forward_progress(total: int, *, quiet: bool, unit: str = "forwards") -> Iterator[ForwardProgress]:
    """Progress over `total` forwards, or other units; on a terminal its last state stays."""
    progress = ForwardProgress(total, quiet=quiet, unit=unit)
    try:
        yield progress
    finally:
        if progress.stream.isatty():
            progress.close(0)
