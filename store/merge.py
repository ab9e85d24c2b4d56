"""Make one plain store of a run's parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .derived import copy_derived
from .errors import DiskFullError, IncompleteRunError, OutputExistsError
from .growing import dimensions
from .info import human_bytes
from .manifest import MANIFEST, Manifest, consolidate, replace_file, sync
from .part_reader import PartReader, Rows
from .parts import DERIVED, PARTS, Part, part_count, read_parts, root_attributes, unfinished
from .reader import group as open_group
from .reader import open_run, read_manifest
from .schema import ArraySchema, GroupSchema
from .sweep_file import require_no_sweep
from .writer import RunWriter

DRAFT = "merged.partial"
# Batches were those of the parts, which is how to compute them again.
MERGED = "merged_from_parts"
COMMIT_BYTES = 2 << 30


def merge_run(path: str | Path, output: str | Path | None = None) -> Path:
    """Make one plain store of a run's parts: beside it in `output`, or in its own place.

    Streams some 64 MB at a time. Needs the size of the run once more on disk, and gives it back at the end
    where there is no `output`. Killed at any moment, the same call continues; a merged run is left as it is.
    Results and sweeps under way stay with the run; of those, `output` gets the results.

    Returns
    -------
    The plain run's folder.

    Raises
    ------
    IncompleteRunError    a part is missing or unfinished; its number is named.
    OutputExistsError     `output` holds something else; a sweep is at work on the parts.
    DiskFullError         the disk has no room for the result.
    """
    run = Path(path)
    count = part_count(run)
    if count is None:
        read_manifest(run)
        _clear(run)
        return run
    parts = read_parts(run, count)
    lacking = unfinished(parts)
    if lacking:
        raise IncompleteRunError(
            f"{run} cannot be merged: of its {count} parts, {lacking}.",
            f"Run the same capture command with --parts {count} --part N for each of them first.",
        )
    if output is not None:
        _write(run, parts, Path(output))
        copy_derived(run, Path(output))
        return Path(output)
    require_no_sweep(run)
    if not (run / MANIFEST).exists():
        _write(run, parts, run / DRAFT)
    _put_in_place(run)
    _clear(run)
    return run


def _write(run: Path, parts: list[Part], target: Path) -> None:
    manifests = [part.manifest for part in parts if part.manifest is not None]
    samples = sum(manifest.samples for manifest in manifests)
    attributes = {key: value for key, value in root_attributes(run).items() if key != PARTS}
    attributes[MERGED] = len(parts)
    if target.exists() and any(target.iterdir()):
        if _is_done(target, attributes["run_id"]):
            return
        writer = RunWriter.resume(target, attributes)
    else:
        _check_disk(target, sum(manifest.stored_bytes for manifest in manifests))
        writer = RunWriter.create(target, attributes, stored_groups(Path(parts[0].path)), samples=samples)
    with writer:
        uncommitted = 0
        for block in _blocks(parts, writer.samples):
            writer.append(block, samples=len(block["samples"]["status"]))
            uncommitted += sum(values.nbytes for columns in block.values() for values in columns.values())
            if uncommitted > COMMIT_BYTES:
                writer.commit()
                uncommitted = 0
        first = open_run(parts[0].path)
        for group, axis in manifests[0].axes.items():
            if axis is None:
                held = open_group(first, group)
                writer.put_static(group, held.compute(), _own(held.attrs))
        writer.finish()


def _is_done(target: Path, run_id: str) -> bool:
    manifest = read_manifest(target)
    if manifest.run_id != run_id:
        raise OutputExistsError(
            f"{target} holds another run ({manifest.run_id}, not {run_id}).",
            "Choose another --output-dir; nothing there was touched.",
        )
    return manifest.complete


def _check_disk(target: Path, needed: int) -> None:
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFullError(
            f"The merged run needs {human_bytes(needed)}; {human_bytes(free)} are free. Nothing was written.",
            "Free some space, or merge onto another disk with --output-dir.",
        )


def stored_groups(run: Path) -> list[GroupSchema]:
    """The growing groups of a stored run, as they were created."""
    root = zarr.open_group(str(run), mode="r", use_consolidated=False)
    manifest = Manifest.parse((run / MANIFEST).read_bytes(), str(run))
    found = []
    for path, axis in manifest.axes.items():
        if axis is None:
            continue
        node: Any = root[path]
        arrays, coords = [], {}
        for name, array in node.arrays():
            dims = dimensions(array)
            if axis not in dims:
                coords[name] = np.asarray(array[...])
                continue
            sizes = {dim: size for dim, size in zip(dims, array.shape, strict=True) if dim != axis}
            dtype = "string" if array.dtype.kind in "TO" else str(array.dtype)
            arrays.append(ArraySchema(name, tuple(dims), dtype, sizes, dict(array.attrs)))
        order = sorted(arrays, key=lambda array: array.name)
        found.append(GroupSchema(path, axis, tuple(order), _own(dict(node.attrs)), coords))
    return found


def _own(attributes: Any) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key != "coordinates"}


def _blocks(parts: list[Part], done: int) -> Iterator[Rows]:
    """Blocks of whole samples, in order, from sample `done` of the merged run on."""
    before: dict[str, int] = {}
    for part in parts:
        assert part.manifest is not None
        if done < before.get("samples", 0) + part.manifest.samples:
            reader = PartReader(Path(part.path), part.manifest)
            first = max(0, done - before.get("samples", 0))
            while first < reader.samples:
                last = reader.block_end(first)
                yield reader.read(first, last, before)
                first = last
        for group, rows in part.manifest.rows.items():
            before[group] = before.get(group, 0) + rows


def _put_in_place(run: Path) -> None:
    """Move the finished store over its parts; replacing the root's zarr.json is the instant it happens."""
    draft = run / DRAFT
    if (draft / MANIFEST).exists():
        for node in sorted(draft.iterdir()):
            if node.is_dir():
                shutil.rmtree(run / node.name, ignore_errors=True)
                node.rename(run / node.name)
        sync(run)
        root = (draft / "zarr.json").read_bytes()
        # The manifest goes last of the draft's files: where it stands, everything else does.
        replace_file(run / "zarr.json.merged", root)
        (draft / MANIFEST).rename(run / MANIFEST)
        sync(run)
    (run / "zarr.json.merged").replace(run / "zarr.json")
    sync(run)


def _clear(run: Path) -> None:
    """Name the results that stayed where they were, and remove what a merge leaves behind."""
    if (run / PARTS).exists() and (run / DERIVED).is_dir():
        consolidate(run, without=PARTS)
    shutil.rmtree(run / PARTS, ignore_errors=True)
    for draft in run.glob("merged.*partial"):
        shutil.rmtree(draft, ignore_errors=True)
