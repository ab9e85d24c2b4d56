"""How far a job is: rate, time left, bytes written; on standard error."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 30.0


@dataclass
class Progress:
    """One line, redrawn on a terminal; in a log a line every half minute, and one at the end."""

    total: int
    done: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = False

    def __post_init__(self) -> None:
        self.begun = self.shown = time.monotonic()
        self.first = self.done
        self.tokens = 0
        self.bytes = 0

    def advance(self, samples: int, tokens: int, written: int) -> None:
        """Count a batch; `written` is the number of bytes in the store so far."""
        self.done += samples
        self.tokens += tokens
        self.bytes = written
        pause = TERMINAL_SECONDS if self.stream.isatty() else LOG_SECONDS
        if not self.quiet and time.monotonic() - self.shown >= pause:
            self._show()

    def close(self, written: int) -> None:
        """Show the last state and leave the line."""
        self.bytes = written
        if not self.quiet and self.done > self.first:
            self._show()
            if self.stream.isatty():
                self.stream.write("\n")

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if not self.quiet:
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def line(self) -> str:
        """The line as it is now."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        new = self.done - self.first
        left = human_seconds((self.total - self.done) * seconds / new) if new else "unknown"
        return (
            f"{self.done}/{self.total} samples  {new / seconds:.1f} samples/s  "
            f"{self.tokens / seconds:,.0f} tokens/s  {human_bytes(self.bytes)} written  {left} left"
        )

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.stream.write(f"\r{self.line()}\x1b[K" if self.stream.isatty() else f"{self.line()}\n")
        self.stream.flush()


def human_bytes(count: float) -> str:
    """1234567 as '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """3725 as '1 h 02 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
