"""A sweep of a model: how far it is, where its result is kept, and how a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mechanistic.store import write_derived
from mechanistic.store.derived import check_writable, write_result
from mechanistic.store.differences import differences
from mechanistic.store.errors import OutputExistsError, UsageError
from mechanistic.store.location import is_url
from mechanistic.store.parts import DERIVED, root_attributes
from mechanistic.store.sweep_file import Arrays, StepFile, open_sweep, sweep_folder

if TYPE_CHECKING:
    from mechanistic.capture.forward_progress import ForwardProgress

# These do not decide what comes out. How samples are batched decides rounding, and so what goes on.
_ASIDE = ("samples", "model", "processor", "name", "quiet")
_BATCHED = ("batch_size", "internal_batch_size")


@dataclass(frozen=True)
class Steps:
    """Steps of a sweep, one after another: what the sweep that was killed gave, then what is computed."""

    file: StepFile | None
    progress: ForwardProgress

    def __call__(self, compute: Callable[[], Mapping[str, Any]], of: str | None = None) -> Arrays:
        """The arrays of the next step: one forward, or as many as its array `of` is long."""
        found = None if self.file is None else self.file.next()
        known = found is not None
        if found is None:
            found = {name: np.asarray(value) for name, value in compute().items()}
            if self.file is not None:
                self.file.add(found)
        count = 1 if of is None else len(found[of])
        if known:
            self.progress.skip(count)
        else:
            self.progress.advance(count, 0, lambda: 0)
        return found


@dataclass(frozen=True)
class Sweep:
    """What decides a sweep, and where it is kept: in the run `run`, or in a folder of its own; or nowhere."""

    parameters: Mapping[str, Any]
    name: str | Path | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.run is not None:
            if not self.run:
                raise UsageError(
                    "This run has no folder to store a result in.", "Open it with open_run(PATH)."
                )
            check_writable(self.run, str(self.name))
        elif is_url(str(self.name)):
            raise UsageError(f"{self.name} is a URL, which cannot be written to.", "Give a folder.")

    @cached_property
    def held(self) -> xr.Dataset | None:
        """The finished result of this very sweep, if it is there.

        Raises
        ------
        OutputExistsError    what is there is something else.
        """
        if self.name is None or not self._target.exists():
            return None
        stored = root_attributes(self._target).get("parameters")
        if stored is None:
            raise OutputExistsError(f"{self._target} is not the result of a sweep.", "Give another name.")
        if different := differences(json.loads(stored), _decisive(self.parameters)):
            raise OutputExistsError(
                f"{self._target} is the result of another sweep: {'; '.join(different)}.",
                "Give this one another name.",
            )
        held: xr.Dataset = xr.open_zarr(self._target, chunks=None, consolidated=False).load()
        return held

    @contextmanager
    def steps(self, forwards: int, *, quiet: bool, unit: str = "forwards") -> Iterator[Steps]:
        """Its steps, which are so many forwards together; raises as `open_sweep`."""
        from mechanistic.capture.forward_progress import forward_progress

        with forward_progress(forwards, quiet=quiet, unit=unit) as progress:
            if self.name is None:
                yield Steps(None, progress)
                return
            with open_sweep(self._folder, self.parameters) as file:
                yield Steps(file, progress)

    def keep(self, result: xr.Dataset) -> xr.Dataset:
        """Store the result in place of the steps, and return it."""
        if self.name is None:
            return result
        result = result.assign_attrs(parameters=json.dumps(_decisive(self.parameters)))
        if self.run is not None:
            write_derived(self.run, str(self.name), result)
        else:
            write_result(self._folder / "result.zarr", result)
            (self._folder / "result.zarr").rename(self._target)
        shutil.rmtree(self._folder, ignore_errors=True)
        return result

    @property
    def _target(self) -> Path:
        return Path(str(self.name)) if self.run is None else Path(self.run) / DERIVED / str(self.name)

    @property
    def _folder(self) -> Path:
        if self.run is not None:
            return sweep_folder(self.run, str(self.name))
        return self._target.with_name(f"{self._target.name}.partial")


def named_sweep(analysis: str, arguments: Mapping[str, Any], loaded: Any, samples: Sequence[Any]) -> Sweep:
    """The sweep of a call of `analysis` with these arguments, `name` among them, as they were given.

    Raises
    ------
    UsageError    `name` cannot be a result of the run that the samples are.
    """
    name, given = arguments["name"], arguments["samples"]
    if name is None:
        return Sweep({})
    from mechanistic.capture.samples_hash import hash_samples

    parameters = {
        "analysis": analysis,
        "weights_sha256": loaded.weights_sha256,
        "dtype": loaded.dtype,
        "samples_sha256": hash_samples(samples),
        **{key: _plain(value) for key, value in arguments.items() if key not in _ASIDE},
    }
    run = run_folder(given) if isinstance(given, xr.DataTree) else None
    return Sweep(parameters, name, run)


def run_folder(run: xr.DataTree) -> str:
    """Where a run was opened, "" where it has no folder."""
    return str(run.encoding.get("source", ""))


def _decisive(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without what decides rounding alone; as JSON has it."""
    kept = {key: value for key, value in parameters.items() if key not in _BATCHED}
    return dict(json.loads(json.dumps(kept)))


def _plain(value: Any) -> Any:
    """An argument as JSON can hold it; a labelled array by its hash."""
    if isinstance(value, xr.DataArray):
        labels = {str(name): each.values.tolist() for name, each in value.coords.items()}
        content = json.dumps([value.dims, labels, value.values.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
