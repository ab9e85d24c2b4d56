"""Put damaged chunk files back, from rows that are computed again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .errors import CorruptError
from .growing import GrowingArray, Threads
from .manifest import Manifest, consolidate, deconsolidate, sync
from .verify import damaged_files, place_of
from .writer import folders_of


@dataclass
class DamagedPlace:
    """Rows `start` to `stop` of an array, some of them in damaged files; `values` are filled in again."""

    group: str
    array: str
    axis: str
    start: int
    stop: int
    values: NDArray[Any] | None = field(default=None, repr=False)
    filled: int = 0

    def fill(self, rows: NDArray[Any], first: int, dims: int) -> None:
        """Take what is wanted of rows that begin at row `first` of the run."""
        low, high = max(first, self.start), min(first + rows.shape[dims], self.stop)
        if low >= high:
            return
        lead = (slice(None),) * dims
        if self.values is None:
            shape = list(rows.shape)
            shape[dims] = self.stop - self.start
            self.values = np.empty(shape, rows.dtype)
        self.values[(*lead, slice(low - self.start, high - self.start))] = rows[
            (*lead, slice(low - first, high - first))
        ]
        self.filled += high - low


def damaged_places(run: Path, manifest: Manifest) -> list[DamagedPlace]:
    """Every place of the growing groups whose files are damaged or missing, in order."""
    found: dict[tuple[str, str, int], DamagedPlace] = {}
    for problem in damaged_files(run, manifest):
        path = problem.path.partition("/c/")[0]
        group, _, array = path.rpartition("/")
        axis = manifest.axes.get(group)
        if axis is None:
            continue
        _, start, stop = place_of(run, problem.path)
        stop = min(stop, manifest.rows[group])
        found[group, array, start] = DamagedPlace(group, array, axis, start, stop)
    return [found[key] for key in sorted(found)]


def damaged_static_groups(run: Path, manifest: Manifest) -> list[str]:
    """The groups that do not grow, such as readout/, of which a file is damaged."""
    static = {group for group, axis in manifest.axes.items() if axis is None}
    paths = {problem.path.partition("/c/")[0].rpartition("/")[0] for problem in damaged_files(run, manifest)}
    return sorted(static & paths)


def put_back(run: Path, manifest: Manifest, places: list[DamagedPlace]) -> tuple[Manifest, bool]:
    """Write the places' files again; the manifest then, and whether every file is bit for bit what it was.

    Raises
    ------
    CorruptError    not every row of a place was computed.
    """
    files = dict(manifest.files)
    for place in places:
        if place.values is None or place.filled != place.stop - place.start:
            raise CorruptError(
                f"{place.group}/{place.array}: {place.filled} of {place.stop - place.start} rows came back.",
                "Dataset or model are not what was captured; nothing of this array was changed.",
            )
        with Threads() as threads:
            array = GrowingArray(run / place.group / place.array, place.axis, place.start, threads)
            array.append(place.values)
            array.flush()
            array.wait()
        for folder in folders_of(array.written, array.path):
            sync(folder)
        files |= {file.relative_to(run).as_posix(): entry for file, entry in array.written.items()}
    same = files == manifest.files
    if not same:
        manifest = replace(manifest, files=files)
        _restamp(run, manifest)
    return manifest, same


def _restamp(run: Path, manifest: Manifest) -> None:
    manifest.write(run)
    if manifest.complete:
        deconsolidate(run)
        root = zarr.open_group(str(run), mode="r+", use_consolidated=False)
        root.attrs["completeness"] = {
            "state": "complete",
            "samples": manifest.samples,
            "content_sha256": manifest.content_sha256(),
        }
        consolidate(run)
