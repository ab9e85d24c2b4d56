"""One writer a run: a lock that the operating system lets go of when its process dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from .errors import OutputExistsError

LOCK = ".writer.lock"
# Who only looks whether a lock is taken holds it for an instant; a writer, for longer than this.
TRIES, PAUSE_SECONDS = 4, 0.05


def take_lock(path: Path) -> IO[str]:
    """The lock of a run; OutputExistsError while another process holds it."""
    tries = 0
    while True:
        # Not emptied before it is ours: it says whose it is.
        file = (path / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tries += 1
            with file:
                if tries == TRIES:
                    raise locked(path, _signature(file)) from None
            time.sleep(PAUSE_SECONDS)
            continue
        # The file may have been removed, by the writer that held it, between opening and locking it.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == (path / LOCK).stat().st_ino:
                _sign(file)
                return file
        file.close()


def release_lock(path: Path, file: IO[str]) -> None:
    """Let go; twice is once."""
    if not file.closed:
        with suppress(FileNotFoundError):
            (path / LOCK).unlink()
        file.close()


def writer_of(path: Path) -> str | None:
    """Whose the lock of a run is, as 'process 12 on node7'; None where nobody is writing.

    Only a look: the lock may be taken or let go of in the next instant.
    """
    with suppress(OSError), (path / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _signature(file)
    return None


def require_no_writer(run: Path, folder: Path | None = None) -> None:
    """OutputExistsError while a process holds the lock of a run, whose draft in `folder` it may be.

    For the time before work that would be in vain; `take_lock` decides.
    """
    writer = writer_of(folder or run)
    if writer is not None:
        raise locked(run, writer)


def locked(path: Path, who: str = "") -> OutputExistsError:
    """What the second writer is told."""
    return OutputExistsError(
        f"another process is writing {path}{who and f' ({who})'}.",
        "Wait for it, or give this job another --output-dir.",
    )


def _sign(file: IO[str]) -> None:
    """Say whose the lock is; on a full disk it remains unsaid."""
    file.truncate(0)
    with suppress(OSError):
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


def _signature(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200)
