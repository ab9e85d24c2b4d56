"""How far a sweep of forwards is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .progress import Progress, human_seconds


class ForwardProgress(Progress):
    """Counts forwards; the first line of a log comes after half a minute, so short sweeps say nothing."""

    def line(self) -> str:
        """The line as it is now."""
        state = self.state()
        left = human_seconds(state["seconds_left"]) if state["seconds_left"] is not None else "unknown"
        return f"{self.done}/{self.total} forwards  {state['samples_per_second']:.1f} forwards/s  {left} left"

    def step(self) -> None:
        """Count one forward."""
        self.advance(1, 0, lambda: 0)


@contextmanager
def forward_progress(total: int, *, quiet: bool) -> Iterator[ForwardProgress]:
    """Progress over `total` forwards; on a terminal its last state stays."""
    progress = ForwardProgress(total, quiet=quiet)
    try:
        yield progress
    finally:
        if progress.stream.isatty():
            progress.close(0)
