"""Write a run: groups that grow in step, committed a number of samples at a time."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import xarray as xr
import zarr
from isal.isal_zlib import crc32

from .differences import differences, other_settings
from .disk import full_disk, needed
from .draft import create_root, names_of, new_draft, remove_dead_drafts, sync_all
from .errors import StoreError
from .growing import GrowingArray, Threads, Values
from .lock import locked, release_lock, take_lock
from .manifest import MANIFEST, Manifest, consolidate, deconsolidate, sync
from .node_metadata import METADATA, ArrayMetadata
from .schema import GroupSchema


class RunWriter:
    """The one writer of a run (or of one part of it).

    `append` takes the rows of whole samples, in order; `commit` makes everything appended so far permanent;
    `finish` closes the run for ever. A process killed at any instant loses what was appended since the last
    commit and nothing else: `resume` goes on from there with the same bytes.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: IO[str]) -> None:
        self.path = path
        self.manifest = manifest
        self.samples = manifest.samples
        # Of what was given since, for the price of a run that fills its disk before the first commit.
        self._given, self._given_bytes = 0, 0
        self._lock = lock
        self._threads = Threads()
        self._arrays: dict[str, dict[str, GrowingArray]] = {}
        for group, axis in manifest.axes.items():
            if axis is not None:
                self._arrays[group] = _open_group(path / group, axis, manifest.rows[group], self._threads)

    @classmethod
    def create(
        cls, path: str | Path, attributes: Mapping[str, Any], groups: Sequence[GroupSchema], *, samples: int
    ) -> RunWriter:
        """Start a run of `samples` samples. OutputExistsError when `path` holds anything."""
        path = Path(path)
        draft, lock = new_draft(path)
        run_id = str(attributes.get("run_id", secrets.token_hex(8)))
        manifest = Manifest(run_id=run_id, expected=samples)
        try:
            with full_disk(path):
                create_root(draft, manifest, attributes, groups)
            try:
                draft.rename(path)
            except OSError:
                # Another process was quicker; a full disk fails before.
                raise locked(path) from None
            sync(path.parent)
            return cls(path, manifest, lock)
        except BaseException:
            lock.close()
            shutil.rmtree(draft, ignore_errors=True)
            raise

    @classmethod
    def resume(cls, path: str | Path, attributes: Mapping[str, Any]) -> RunWriter:
        """Continue an unfinished run; OutputExistsError names every attribute that differs.

        A finished run is opened for more samples: from then on, until `finish`, it is an unfinished one.
        """
        path = Path(path)
        remove_dead_drafts(path)
        lock = take_lock(path)
        try:
            manifest = Manifest.parse((path / MANIFEST).read_bytes(), str(path))
            stored = dict(zarr.open_group(str(path), mode="r", use_consolidated=False).attrs)
            different = differences(stored, attributes)
            if different:
                raise other_settings(path, different)
            for leftover in (*path.rglob("*.partial"), *path.rglob("*.__lock")):
                leftover.unlink()
            if manifest.complete:
                manifest = replace(manifest, state="writing")
                manifest.write(path)
                deconsolidate(path)
            return cls(path, manifest, lock)
        except BaseException:
            release_lock(path, lock)
            raise

    def rows(self, group: str) -> int:
        """How many rows a growing group has, with those that are not committed yet."""
        return next(iter(self._arrays[group].values())).rows

    def append(self, *pieces: Mapping[str, Mapping[str, Values]], samples: int) -> None:
        """Add the rows of the next `samples` samples: {group: {array: values}}, every array of a group.

        Values with a dimension `layer` may be one array, or a list of one for each layer.

        Parameters
        ----------
        pieces
            Rows that follow each other, such as one sample's each: together they cost far less than alone.
        """
        self._given += samples
        self._given_bytes += sum(
            _bytes(values) for rows in pieces for columns in rows.values() for values in columns.values()
        )
        with full_disk(self.path, self._needs):
            for group in {group: None for rows in pieces for group in rows}:
                blocks = [rows[group] for rows in pieces if group in rows]
                self._check(group, blocks)
                for name, array in self._arrays[group].items():
                    array.append(*(columns[name] for columns in blocks))
            for array in self._each():
                array.encoded()
        self.samples += samples

    def _check(self, group: str, blocks: Sequence[Mapping[str, Values]]) -> None:
        arrays = self._arrays[group]
        for columns in blocks:
            lengths = {n: arrays[n].rows_in(values) for n, values in columns.items() if n in arrays}
            if columns.keys() != arrays.keys() or len(set(lengths.values())) > 1:
                odd = sorted(columns.keys() ^ arrays.keys()) or lengths
                raise StoreError(
                    f"the rows for {group} do not fit its arrays: {odd}.",
                    f"Every append to {group} gives one equally long block for each of {sorted(arrays)}.",
                )

    def put_static(self, group: str, dataset: xr.Dataset, attrs: Mapping[str, Any] | None = None) -> None:
        """Write a small group whole, such as readout/; part of the next commit."""
        with full_disk(self.path, self._needs):
            shutil.rmtree(self.path / group, ignore_errors=True)
            root = zarr.open_group(str(self.path), mode="r+", use_consolidated=False)
            node = root.create_group(
                group, attributes={**(attrs or {}), "coordinates": names_of(dataset.coords)}
            )
            files = dict(self.manifest.files)
            for name, variable in dataset.variables.items():
                string = variable.dtype.kind in "UTO"
                array = node.create_array(
                    str(name),
                    shape=variable.shape,
                    chunks=tuple(max(1, n) for n in variable.shape),
                    dtype="str" if string else variable.dtype,
                    dimension_names=[str(d) for d in variable.dims],
                    attributes=dict(variable.attrs),
                )
                array[...] = variable.values.astype("T") if string else variable.values
            sync_all(self.path / group)
            for file in sorted((self.path / group).rglob("*")):
                if file.is_file() and file.name != "zarr.json":
                    files[file.relative_to(self.path).as_posix()] = file_entry(file)
            axes = {**self.manifest.axes, group: None}
            self.manifest = replace(self.manifest, files=files, axes=axes)

    def commit(self) -> None:
        """Make every appended sample permanent. The replaced manifest is the instant it happens."""
        with full_disk(self.path, self._needs):
            files = dict(self.manifest.files)
            for array in self._each():
                array.flush()
            for array in self._each():
                array.settle()
            folders: set[Path] = set()
            for array in self._each():
                array.wait()
                folders |= folders_of([array.path / "zarr.json", *array.written], array.path)
                files |= {self._name(file): entry for file, entry in array.written.items()}
            list(self._threads.write.map(sync, sorted(folders)))
            for array in self._each():
                array.written.clear()
            rows = {group: next(iter(arrays.values())).rows for group, arrays in self._arrays.items()}
            self.manifest = replace(self.manifest, samples=self.samples, rows=rows, files=files)
            self.manifest.write(self.path)

    def finish(self) -> None:
        """Commit, consolidate the metadata and mark the run complete."""
        self.commit()
        if self.samples != self.manifest.expected:
            raise StoreError(
                f"{self.path} holds {self.samples} of {self.manifest.expected} samples: not finished.",
                "Run the same capture command again to continue it.",
            )
        with full_disk(self.path, self._needs):
            manifest = self.manifest.finished()
            root = zarr.open_group(str(self.path), mode="r+", use_consolidated=False)
            root.attrs["completeness"] = {
                "state": "complete",
                "samples": self.samples,
                "content_sha256": manifest.content_sha256(),
            }
            consolidate(self.path)
            manifest.write(self.path)
            self.manifest = manifest
        self.close()

    def expect(self, samples: int) -> None:
        """Change how many samples the finished run will have."""
        self.manifest = replace(self.manifest, expected=samples)

    def _needs(self) -> str:
        held = self.manifest
        if held.samples:
            left = held.expected - held.samples
            return needed(left, held.expected, held.stored_bytes, held.samples, "that are there")
        which = f"that the first {self._given} are before compression"
        return needed(held.expected, held.expected, self._given_bytes, self._given, which)

    @property
    def bytes_written(self) -> int:
        """Bytes on disk: what is committed, and the files written since."""
        files = dict(self.manifest.files)
        for array in self._each():
            # A copy, since other threads add to it.
            files |= {self._name(file): entry for file, entry in array.written.copy().items()}
        return sum(size for size, _ in files.values())

    def close(self) -> None:
        """Let go of the run without a commit; what was appended since the last one is lost."""
        if not self._lock.closed:
            for array in self._each():
                with suppress(Exception):
                    array.wait()
            self._threads.close()
            release_lock(self.path, self._lock)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def _each(self) -> Iterator[GrowingArray]:
        for arrays in self._arrays.values():
            yield from arrays.values()


def _open_group(path: Path, axis: str, rows: int, threads: Threads) -> dict[str, GrowingArray]:
    arrays = [file.parent for file in path.glob(f"*/{METADATA}")]
    growing = [each for each in arrays if axis in ArrayMetadata.read(each).dims]
    return {each.name: GrowingArray(each, axis, rows, threads) for each in growing}


def _bytes(values: Values) -> int:
    return values.nbytes if isinstance(values, np.ndarray) else sum(layer.nbytes for layer in values)


def file_entry(file: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    data = file.read_bytes()
    return len(data), crc32(data)


def folders_of(files: Iterable[Path], root: Path) -> set[Path]:
    """Every folder from these files up to `root`: each may be new, and names what is below it."""
    return {folder for file in files for folder in file.parents if folder.is_relative_to(root)}
