"""A disk that fills up while a run is written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskFullError
from .info import human_bytes
from .manifest import Manifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_FULL = ("No space left", "Disk quota exceeded", "File too large")


@contextmanager
def full_disk(path: Path, manifest: Manifest | None = None) -> Iterator[None]:
    """A full disk, quota or file size limit is an error of its own, with an estimate of what is lacking."""
    try:
        yield
    except Exception as cause:
        if getattr(cause, "errno", None) not in _FULL and not any(text in str(cause) for text in _SAYS_FULL):
            raise
        raise DiskFullError(
            f"the disk that holds {path} is full; everything committed so far is intact.{_needed(manifest)}",
            "Free some space and run the same command again: it continues where it stopped.",
        ) from cause


def _needed(manifest: Manifest | None) -> str:
    if manifest is None or not manifest.samples:
        return ""
    left = manifest.expected - manifest.samples
    more = manifest.stored_bytes / manifest.samples * left
    return (
        f" The {left} samples that are left of {manifest.expected} need about {human_bytes(more)} more, "
        f"going by the {human_bytes(manifest.stored_bytes)} that are there."
    )
