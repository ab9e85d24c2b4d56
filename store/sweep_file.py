"""The numbers of a sweep that is under way, kept with the run so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .derived import check_writable
from .differences import differences
from .disk import full_disk
from .errors import OutputExistsError
from .lock import release_lock, take_lock
from .manifest import replace_file
from .parts import DERIVED

_PARAMETERS, _VALUES = "sweep.json", "values.npy"


@contextmanager
def open_sweep(
    run: str | Path, name: str, parameters: Mapping[str, Any], shape: tuple[int, ...]
) -> Iterator[NDArray[np.float64]]:
    """An array on disk, NaN where nothing was put yet, that outlives the process that fills it.

    It lies beside the result derived/NAME that it will become. What is assigned to it is kept when the
    process is killed. `close_sweep` removes it.

    Raises
    ------
    OutputExistsError    a sweep of this name is under way with other parameters, or in another process.
    """
    check_writable(run, name)
    folder = sweep_folder(run, name)
    with full_disk(Path(run)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        try:
            _begin(folder, name, json.loads(json.dumps(parameters)), shape)
            values = np.lib.format.open_memmap(folder / _VALUES, mode="r+")
            yield values
            values.flush()
        finally:
            release_lock(folder, lock)


def close_sweep(run: str | Path, name: str) -> None:
    """Remove what `open_sweep` made, once its result is stored."""
    shutil.rmtree(sweep_folder(run, name), ignore_errors=True)


def sweep_folder(run: str | Path, name: str) -> Path:
    """Where the numbers of a sweep lie while it is under way."""
    return Path(run) / DERIVED / ".sweeps" / name


def _begin(folder: Path, name: str, parameters: dict[str, Any], shape: tuple[int, ...]) -> None:
    if (folder / _PARAMETERS).exists():
        stored = json.loads((folder / _PARAMETERS).read_text())
        different = differences(stored, parameters)
        if different:
            raise OutputExistsError(
                f"A sweep '{name}' with other parameters is under way in this run: {'; '.join(different)}.",
                f"Give this one another name, or remove {folder}.",
            )
        return
    draft = folder / f"{_VALUES}.partial"
    empty = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float64, shape=shape)
    empty[...] = np.nan
    empty.flush()
    os.replace(draft, folder / _VALUES)
    replace_file(folder / _PARAMETERS, json.dumps(parameters).encode())
