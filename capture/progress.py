"""How far a job is: rate, time left, bytes written; on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 30.0


@dataclass
class Progress:
    """One line, redrawn on a terminal; in a log a line every half minute, and one at the end."""

    total: int
    done: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    quiet: bool = False
    log_json: bool = False
    failed: int = 0

    def __post_init__(self) -> None:
        self.begun = self.shown = time.monotonic()
        self.first = self.done
        self.tokens: int | None = 0
        self.bytes = 0

    def advance(self, samples: int, tokens: int | None, written: Callable[[], int]) -> None:
        """Count samples, and tokens unless they are not known (None).

        `written` says how many bytes are on disk, and is asked only when that is shown.
        """
        self.done += samples
        self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens
        pause = TERMINAL_SECONDS if self.stream.isatty() and not self.log_json else LOG_SECONDS
        if not self.quiet and time.monotonic() - self.shown >= pause:
            self.bytes = written()
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
            line = json.dumps({"message": text}) if self.log_json else text
            self.stream.write(f"\r{line}\x1b[K\n" if self.stream.isatty() else f"{line}\n")
            self.stream.flush()

    def line(self) -> str:
        """The line as it is now."""
        state = self.state()
        left = human_seconds(state["seconds_left"]) if state["seconds_left"] is not None else "unknown"
        rate = state["tokens_per_second"]
        tokens = f"{rate:,.0f} tokens/s  " if rate is not None else ""
        failed = f"{self.failed} failed  " if self.failed else ""
        return (
            f"{self.done}/{self.total} samples  {state['samples_per_second']:.1f} samples/s  "
            f"{tokens}{human_bytes(self.bytes)} written  {failed}{left} left"
        )

    def state(self) -> dict[str, Any]:
        """The same for machines."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        new = self.done - self.first
        return {
            "samples": self.done,
            "samples_total": self.total,
            "failed": self.failed,
            "samples_per_second": new / seconds,
            "tokens_per_second": None if self.tokens is None else self.tokens / seconds,
            "bytes_written": self.bytes,
            "seconds": seconds,
            "seconds_left": (self.total - self.done) * seconds / new if new else None,
        }

    def _show(self) -> None:
        self.shown = time.monotonic()
        if self.log_json:
            self.stream.write(json.dumps(self.state()) + "\n")
        else:
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
