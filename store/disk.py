"""A disk that fills up while a run is written."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFullError
from .info import human_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_FULL = ("No space left", "Disk quota exceeded", "File too large")


@contextmanager
def full_disk(path: Path, needs: Callable[[], str] = str) -> Iterator[None]:
    """A full disk, quota or file size limit is an error of its own; `needs` says what is lacking."""
    try:
        yield
    except Exception as cause:
        if getattr(cause, "errno", None) not in _FULL and not any(text in str(cause) for text in _SAYS_FULL):
            raise
        raise DiskFullError(
            f"the disk that holds {path} is full; everything committed so far is intact.{needs()}",
            "Free some space and run the same command again: it continues where it stopped.",
        ) from cause


def needed(left: int, expected: int, size: int, samples: int, which: str) -> str:
    """What the samples that are not committed need, going by the bytes of `samples` samples, `which` are."""
    if not samples:
        return ""
    return (
        f" The {left} samples that are left of {expected} need about {human_bytes(size / samples * left)} "
        f"more, going by the {human_bytes(size)} {which}."
    )
