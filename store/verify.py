"""Check a run against the format and its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from isal.isal_zlib import crc32

from .errors import FormatError, MechanisticError, UsageError
from .growing import dimensions
from .location import is_url
from .manifest import Manifest
from .parts import part_count, read_parts
from .reader import check_version, open_run, read_manifest
from .reader import group as open_group
from .schema import token_columns

ROOT_ATTRIBUTES = ("format", "format_version", "run_id", "created", "model", "dataset", "capture")
REQUIRED_GROUPS = ("samples",)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and which rows of samples/ it touches."""

    path: str
    what: str
    samples: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.path}: {self.what}"
        first, last = min(self.samples), max(self.samples)
        return f"{self.path}: {self.what} (samples {first} to {last})"


def verify_run(path: str | Path) -> list[Problem]:
    """Every problem of a run in a local folder; an empty list means that it is sound.

    Checks that each chunk file named by the manifest is there with its size and CRC-32, that every group has
    the dimensions, lengths and columns that the format demands, and that labels lie in their ranges.

    Raises
    ------
    UsageError   nothing is at `path`, or it is a URL.
    FormatError  it is not a run at all, or is of a newer format.
    """
    if is_url(str(path)):
        raise UsageError("verify reads every byte and works on a local folder.", f"Copy {path} first.")
    count = part_count(path)
    return _plain(Path(path)) if count is None else _parts(Path(path), count)


def _parts(run: Path, count: int) -> list[Problem]:
    problems, before = [], 0
    for part in read_parts(run, count):
        name = Path(part.path).relative_to(run).as_posix()
        if part.manifest is None:
            problems.append(Problem(name, "this part never ran"))
            continue
        for found in _plain(Path(part.path)):
            where = f"{name}/{found.path}".rstrip("/")
            problems.append(Problem(where, found.what, tuple(row + before for row in found.samples)))
        before += part.manifest.samples
    return problems


def _plain(run: Path) -> list[Problem]:
    manifest = read_manifest(run)
    root = _root(run)
    check_version(root.attrs, str(run))
    problems = [Problem("/", f"lacks the attribute {n!r}") for n in ROOT_ATTRIBUTES if n not in root.attrs]
    problems += [Problem(n, "missing") for n in REQUIRED_GROUPS if n not in manifest.axes]
    damaged = list(damaged_files(run, manifest))
    problems += damaged
    completeness: Any = root.attrs.get("completeness") or {}
    if manifest.complete and completeness.get("content_sha256") != manifest.content_sha256():
        problems.append(
            Problem("manifest.json", "its content hash differs from the one in the root attributes")
        )
    try:
        tree = open_run(run, allow_partial=True)
    except MechanisticError as error:
        return [*problems, Problem("/", error.what)]
    broken = {p.path.split("/c/")[0] for p in damaged}
    for group, axis in manifest.axes.items():
        if axis is not None:
            problems += _group(open_group(tree, group), group, axis, manifest, broken)
        if group.endswith("/pattern_rows") and not {f"{group}/start", f"{group}/length"} & broken:
            problems += _pattern_rows(open_group(tree, group), group, manifest)
    return problems


def _root(run: Path) -> zarr.Group:
    try:
        return zarr.open_group(str(run), mode="r", use_consolidated=False)
    except Exception as cause:
        raise FormatError(
            f"{run} has no readable zarr.json ({type(cause).__name__}).",
            "The copy is incomplete or damaged: copy the whole folder again.",
        ) from cause


def damaged_files(run: Path, manifest: Manifest) -> Iterator[Problem]:
    """Every chunk file that is not what the manifest says."""
    for name, (size, checksum) in manifest.files.items():
        file = run / name
        if not file.is_file():
            yield Problem(name, "missing", _samples(run, name))
            continue
        data = file.read_bytes()
        if len(data) == size and crc32(data) == checksum:
            continue
        # Until a run is finished its last shards are replaced at every commit, ahead of the manifest.
        if not manifest.complete and _is_last(run, name, manifest):
            continue
        what = f"{len(data)} bytes, not {size}" if len(data) != size else "its checksum differs"
        yield Problem(name, what, _samples(run, name))


def place_of(run: Path, file: str) -> tuple[str, int, int]:
    """The group of a chunk file, and the rows it covers on the group's growing axis."""
    array_path, _, index = file.partition("/c/")
    group = array_path.rpartition("/")[0]
    array = zarr.open_array(str(run / array_path), mode="r")
    dims = dimensions(array)
    axis = 1 if dims[0] == "layer" and len(dims) > 1 else 0
    rows = (array.shards or array.chunks)[axis]
    start = int(index.split("/")[axis]) * rows
    return group, start, start + rows


def _is_last(run: Path, file: str, manifest: Manifest) -> bool:
    group, _, stop = place_of(run, file)
    return stop > manifest.rows.get(group, 0)


def _samples(run: Path, file: str) -> tuple[int, ...]:
    """The samples whose data a chunk file holds; none where that cannot be told."""
    try:
        group, start, stop = place_of(run, file)
        if group in ("samples",) or file.split("/")[1].endswith("_last"):
            return tuple(range(start, stop))
        index = np.asarray(zarr.open_array(str(run / group / "sample_index"), mode="r")[start:stop])
    except Exception:
        return ()
    return tuple(int(i) for i in np.unique(index))


def _group(
    data: xr.Dataset, group: str, axis: str, manifest: Manifest, broken: set[str]
) -> Iterator[Problem]:
    if data.sizes.get(axis) != manifest.rows[group]:
        yield Problem(
            group, f"{axis} has length {data.sizes.get(axis)}, the manifest says {manifest.rows[group]}"
        )
    if axis in ("token", "patch"):
        for column in token_columns(axis):  # type: ignore[arg-type]
            if column.name not in data.variables:
                yield Problem(f"{group}/{column.name}", "missing")
    if group == "samples" and data.sizes.get("sample") != manifest.samples:
        yield Problem(group, f"{data.sizes.get('sample')} rows for {manifest.samples} samples")
    if "sample_index" in data.variables and f"{group}/sample_index" not in broken:
        yield from _sample_index(data["sample_index"].values, group, manifest)
    for name, variable in data.variables.items():
        allowed = variable.attrs.get("flag_values")
        if allowed is not None and f"{group}/{name}" not in broken:
            odd = np.setdiff1d(variable.values, np.asarray(allowed))
            if odd.size:
                yield Problem(
                    f"{group}/{name}", f"holds {odd[:5].tolist()}, which its flag_values do not name"
                )


def _pattern_rows(rows: xr.Dataset, group: str, manifest: Manifest) -> Iterator[Problem]:
    """Rows of attention stand end to end: each begins where the one before it ends, to the last entry."""
    lacking = [name for name in ("start", "length", "key_start") if name not in rows.variables]
    if lacking:
        yield Problem(group, f"lacks {', '.join(lacking)}")
        return
    start, length = (np.asarray(rows[name].values) for name in ("start", "length"))
    ends = np.concatenate([[0], np.cumsum(length)])
    if (wrong := np.flatnonzero(start != ends[:-1])).size:
        row = int(wrong[0])
        what = f"row {row} starts at entry {start[row]}, where the rows before it end at {ends[row]}"
        yield Problem(f"{group}/start", what, _owners(rows, wrong))
    if (short := np.flatnonzero(length < 1)).size:
        yield Problem(
            f"{group}/length", f"row {short[0]} has {length[short[0]]} entries", _owners(rows, short)
        )
    entries = manifest.rows.get(group.removesuffix("_rows"), 0)
    if ends[-1] != entries:
        yield Problem(f"{group}/length", f"rows of {ends[-1]} entries in all, for {entries} in the pattern")


def _owners(rows: xr.Dataset, wrong: np.ndarray) -> tuple[int, ...]:
    if "sample_index" not in rows.variables:
        return ()
    return tuple(int(i) for i in np.unique(rows["sample_index"].values[wrong]))


def _sample_index(index: np.ndarray, group: str, manifest: Manifest) -> Iterator[Problem]:
    if index.size and (index.min() < 0 or index.max() >= manifest.samples):
        yield Problem(f"{group}/sample_index", f"points outside samples/ (0 to {manifest.samples - 1})")
    if np.any(np.diff(index) < 0):
        yield Problem(f"{group}/sample_index", "is not in order: the tokens of a sample must be contiguous")
