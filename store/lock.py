"""One writer a run: a lock that the operating system lets go of when its process dies."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from .errors import OutputExistsError

LOCK = ".writer.lock"


def take_lock(path: Path) -> IO[str]:
    """The lock of a run; OutputExistsError while another process holds it."""
    while True:
        file = (path / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise locked(path) from None
        # The file may have been removed, by the writer that held it, between opening and locking it.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == (path / LOCK).stat().st_ino:
                return file
        file.close()


def release_lock(path: Path, file: IO[str]) -> None:
    """Let go; twice is once."""
    if not file.closed:
        with suppress(FileNotFoundError):
            (path / LOCK).unlink()
        file.close()


def locked(path: Path) -> OutputExistsError:
    """What the second writer is told."""
    return OutputExistsError(
        f"another process is writing {path}.", "Wait for it, or give this job another --output-dir."
    )
