"""Writing in a thread of its own, one window behind the model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class WriteBehind:
    """Runs one piece of work while the caller prepares the next; never more than one waits.

    What a piece raises is raised by the next `put` or `wait`, or at the end of the block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future[None] | None = None

    def put(self, work: Callable[[], None]) -> None:
        """Start this piece when the one before is done."""
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for the piece that was started last."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error: the run is let go of only when nothing is being written to it.
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
