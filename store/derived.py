"""Results written back into a run, under derived/NAME: beside its content, never part of its hash."""

from __future__ import annotations

import re
import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from .disk import full_disk
from .errors import IncompleteRunError, OutputExistsError, SpecificationError, StoreError, UsageError
from .location import is_url
from .lock import release_lock, take_lock
from .manifest import consolidate
from .parts import DERIVED, SWEEPS, part_count
from .reader import read_manifest

_NAME = re.compile(r"\w[\w.-]*")


def write_derived(run: str | Path, name: str, result: xr.Dataset, *, replace: bool = False) -> Path:
    """Store a result with the run it came from; `open_run` then shows it as derived/NAME.

    The run's content hash, its manifest and its other groups stay as they are; a lazy result is computed
    block by block. It appears under its name only when it is whole.

    Parameters
    ----------
    replace
        Also where the run has a result of this name already.

    Returns
    -------
    the folder of the result.

    Raises
    ------
    UsageError, SpecificationError
                        `run` is a URL, or no run; a name that is not letters, digits, `_`, `.` and `-`.
    OutputExistsError   the run has such a result and `replace` is False; another process writes the run.
    IncompleteRunError  the run, or a part of it, is unfinished.
    StoreError          the run may not be written to; DiskFullError when its disk is full.
    """
    check_writable(run, name)
    folder = Path(run) / DERIVED
    target, draft = folder / name, folder / f"{name}.partial"
    if target.exists() and not replace:
        raise OutputExistsError(
            f"{run} has a result {DERIVED}/{name} already.", "Give this one another name, or replace it."
        )
    try:
        with full_disk(Path(run)):
            folder.mkdir(exist_ok=True)
            write_result(draft, result)
            _put_in_place(Path(run), draft, target)
    except PermissionError as cause:
        raise StoreError(
            f"{run} may not be written to, so {DERIVED}/{name} was not stored.",
            "Copy the run to where you may write, or keep the result elsewhere: result.to_zarr(PATH).",
        ) from cause
    return target


def write_result(path: Path, result: xr.Dataset) -> None:
    """Store a result in a folder of its own, in place of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    stamped = storable(result.assign_attrs(created=datetime.now(UTC).isoformat(timespec="seconds")))
    with warnings.catch_warnings():
        # Zarr v3 has no final specification of strings; what is written is what every reader writes.
        warnings.filterwarnings("ignore", "The data type .* does not have a Zarr V3 specification")
        stamped.to_zarr(path, mode="w-", zarr_format=3, consolidated=False)


def check_writable(run: str | Path, name: str) -> None:
    """Raise what `write_derived` would raise for this run and name, before a result is computed."""
    if is_url(str(run)):
        raise UsageError(f"{run} is a URL, which cannot be written to.", "Copy the run to a folder first.")
    if not _NAME.fullmatch(name) or name.endswith(".partial"):
        raise SpecificationError(
            f"a result cannot be called {name!r}.", "Use letters, digits, _, . and -, such as 'swap_subject'."
        )
    if not read_manifest(run).complete:
        raise IncompleteRunError(
            f"{run} is unfinished, so no result can be stored with it.",
            "Run its capture command again to finish it.",
        )


def copy_derived(run: Path, target: Path) -> None:
    """Take the results of a run in parts along into the plain store that is made of it elsewhere.

    Sweeps under way stay with the parts, where they go on.
    """
    if not (run / DERIVED).is_dir():
        return
    if not (target / DERIVED).exists():
        draft = target / f"{DERIVED}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(run / DERIVED, draft, ignore=shutil.ignore_patterns(SWEEPS, "*.partial"))
        draft.rename(target / DERIVED)
    consolidate(target)


def storable(result: xr.Dataset) -> xr.Dataset:
    """As Zarr can hold it: strings of any length, and text for attributes that JSON does not know."""
    fixed = [name for name, variable in result.variables.items() if variable.dtype.kind == "U"]
    kept = result.assign({name: result[name].astype(object) for name in fixed})
    kept.attrs = {key: _plain(value) for key, value in kept.attrs.items()}
    for variable in kept.variables.values():
        variable.encoding.clear()
        variable.attrs = {key: _plain(value) for key, value in variable.attrs.items()}
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def _put_in_place(run: Path, draft: Path, target: Path) -> None:
    lock = take_lock(run)
    try:
        zarr.open_group(str(run / DERIVED), mode="a", zarr_format=3, use_consolidated=False)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        # Of a run in parts the root belongs to all of them; its results are found by their own folder.
        consolidate(run if part_count(run) is None else run / DERIVED)
    finally:
        release_lock(run, lock)
