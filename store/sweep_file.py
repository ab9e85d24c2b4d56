"""What the steps of a sweep gave so far, kept on disk so that a killed one goes on where it was."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .differences import differences
from .disk import full_disk
from .errors import OutputExistsError
from .lock import release_lock, take_lock
from .manifest import replace_file
from .parts import DERIVED, SWEEPS

Arrays = dict[str, NDArray[Any]]

_PARAMETERS, _STEPS = "sweep.json", "steps"
# Length and CRC-32 of what follows.
_HEAD = struct.Struct("<QI")
_TEXT = ":text"


class StepFile:
    """The results of steps end to end, in the order in which they are computed.

    One that was being written when its process died is dropped.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b")
        self._size = path.stat().st_size

    def next(self) -> Arrays | None:
        """What the following step gave; None behind the last one that is kept."""
        start = self._file.tell()
        head = self._file.read(_HEAD.size)
        length, check = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
        # What a crash leaves is no length: it may ask for more than there is memory.
        data = self._file.read(length) if length <= self._size - start else b""
        if data and zlib.crc32(data) == check:
            return _unpacked(data)
        self._file.seek(start)
        self._file.truncate()
        self._size = start
        return None

    def add(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what the following step gave; it outlives the process from here on."""
        data = _packed(arrays)
        self._file.write(_HEAD.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()
        self._size = self._file.tell()

    def close(self) -> None:
        """Nothing more is read or kept."""
        self._file.close()


@contextmanager
def open_sweep(folder: Path, parameters: Mapping[str, Any]) -> Iterator[StepFile]:
    """The steps of a sweep, in a folder of its own, from the first on.

    Raises
    ------
    OutputExistsError    a sweep with other parameters is under way there, or another process is at it.
    """
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        try:
            _begin(folder, json.loads(json.dumps(parameters)))
            steps = StepFile(folder / _STEPS)
            try:
                yield steps
            finally:
                steps.close()
        finally:
            release_lock(folder, lock)


def sweep_folder(run: str | Path, name: str) -> Path:
    """Where the steps of a sweep lie while it is under way: beside the derived/NAME that it becomes."""
    return Path(run) / DERIVED / SWEEPS / name


def require_no_sweep(run: Path) -> None:
    """OutputExistsError while another process is at a sweep of this run."""
    for folder in sorted((run / DERIVED / SWEEPS).glob("*")):
        try:
            release_lock(folder, take_lock(folder))
        except OutputExistsError:
            raise OutputExistsError(
                f"The sweep '{folder.name}' reads {run} in another process.",
                "Wait for it, or stop it: it goes on afterwards where it was.",
            ) from None


def _begin(folder: Path, parameters: dict[str, Any]) -> None:
    path = folder / _PARAMETERS
    if not path.exists():
        replace_file(path, json.dumps(parameters).encode())
    elif different := differences(json.loads(path.read_text()), parameters):
        raise OutputExistsError(
            f"A sweep '{folder.name}' with other parameters is under way: {'; '.join(different)}.",
            f"Give this one another name, or remove {folder}.",
        )


def _packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    plain: dict[str, Any] = {}
    for name, values in arrays.items():
        if values.dtype == object:
            # As text, since arrays of objects would be pickled.
            plain[name + _TEXT] = np.frombuffer(json.dumps(values.tolist()).encode(), np.uint8)
        else:
            plain[name] = values
    file = io.BytesIO()
    np.savez(file, **plain)
    return file.getvalue()


def _unpacked(data: bytes) -> Arrays:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        held: Arrays = dict(stored)
    return {
        name.removesuffix(_TEXT): np.array(json.loads(values.tobytes()), object)
        if name.endswith(_TEXT)
        else values
        for name, values in held.items()
    }
