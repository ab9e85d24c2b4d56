"""A worker whose hook fails in the middle of a job, as one with a mistake in it would."""

from __future__ import annotations

from typing import Any

from mechanistic.capture.vllm_worker import CaptureExtension

FAILS_AT = 12


class FailingExtension(CaptureExtension):
    """Fails in the hooks of some step of a captured batch."""

    def mechanistic_watch(self, *arguments: Any) -> None:
        """Watch, and put a mistake into the recorder."""
        super().mechanistic_watch(*arguments)
        recorder = self._mechanistic_watch.recorder
        rows = recorder._step_rows

        def broken(*given: Any) -> Any:
            if recorder.steps >= FAILS_AT:
                raise ZeroDivisionError("a mistake in a hook")
            return rows(*given)

        recorder._step_rows = broken
