"""SIGTERM and Ctrl-C during a job: the batch in hand is finished, what is whole committed, then it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While active, the first signal is noted and raised by `check`; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers; a job in another thread is stopped by whoever runs it.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C, SystemExit(143) after SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.check()
        self.received = number
        if sys.stderr.isatty():
            # Not through the stream, whose lock the code that was interrupted may hold.
            os.write(2, b"\nstopping after the forward in hand; once more stops without it\n")
