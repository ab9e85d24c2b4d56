"""One chunk file: there whole or not at all, and on the disk, before anything names it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from isal.isal_zlib import crc32

STAGE_BYTES = 4 << 20
# Where a file is large, past the page cache: half the CPU time, and the model's files stay in it.
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_own = threading.local()


def write_file(path: Path, pieces: Iterable[bytes]) -> tuple[int, int]:
    """Write beside, fsync, rename over; size and CRC-32 of the file. The folder is the caller's to sync."""
    temporary = path.with_name(path.name + ".partial")
    try:
        size, crc = _write(temporary, pieces)
        temporary.replace(path)
    except BaseException:
        # A full disk gets its room back.
        with suppress(OSError):
            temporary.unlink()
        raise
    return size, crc


def _write(path: Path, pieces: Iterable[bytes]) -> tuple[int, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        size = crc = 0
        stage = _stage()
        for length in _staged(pieces, stage):
            block = stage[:length]
            crc = crc32(block, crc)
            _direct(handle, on=length == STAGE_BYTES)
            _write_block(handle, block)
            size += length
        os.fsync(handle)
    finally:
        os.close(handle)
    return size, crc


def _stage() -> memoryview:
    """This thread's memory for what is written next: it begins at a page, as writing past the cache demands.

    Kept, since pages that are new to a process cost more than what is copied into them.
    """
    if not hasattr(_own, "stage"):
        _own.stage = memoryview(mmap.mmap(-1, STAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    stage: memoryview = _own.stage
    return stage


def _staged(pieces: Iterable[bytes], stage: memoryview) -> Iterator[int]:
    """Fill the stage with the pieces, again and again; how much it holds each time."""
    used = 0
    for piece in pieces:
        view, done = memoryview(piece), 0
        while done < len(view):
            step = min(len(view) - done, STAGE_BYTES - used)
            stage[used : used + step] = view[done : done + step]
            done, used = done + step, used + step
            if used == STAGE_BYTES:
                yield used
                used = 0
    if used:
        yield used


def _write_block(handle: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        try:
            done += os.write(handle, block[done:])
        except OSError as error:
            # This file system, or what is left of a block written in part, does not go past the cache.
            if error.errno != errno.EINVAL or not _direct(handle, on=False):
                raise


def _direct(handle: int, *, on: bool) -> bool:
    """Whether the file was switched to go past the page cache, or back."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    wanted = flags | _DIRECT if on else flags & ~_DIRECT
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return True
