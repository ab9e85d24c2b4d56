"""A new run, made whole in a folder beside its own: it appears under its name, metadata and all, or not."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import zarr

from .errors import OutputExistsError
from .growing import WRITERS
from .lock import locked, take_lock
from .manifest import Manifest, sync
from .node_metadata import create_array, create_group
from .schema import FORMAT, FORMAT_VERSION, GroupSchema


def new_draft(path: Path) -> tuple[Path, IO[str]]:
    """A folder beside `path`, and its lock: the run appears under its own name when its metadata is whole."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(
            f"{path} already exists.", "Choose another output folder, or remove this one."
        )
    remove_dead_drafts(path)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    draft.mkdir(parents=True)
    try:
        return draft, take_lock(draft)
    except (OutputExistsError, FileNotFoundError):
        # A writer that began in the same instant took the draft for a dead one's.
        raise locked(path) from None


def drafts(path: Path) -> list[Path]:
    """What is beside `path` of writers that were creating it, or still are."""
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    return [found for found in path.parent.glob("*.partial") if own.fullmatch(found.name)]


def remove_dead_drafts(path: Path) -> None:
    """Remove what writers left beside `path` that were killed while they created it."""
    for draft in drafts(path):
        with suppress(OutputExistsError, OSError), take_lock(draft):
            shutil.rmtree(draft)


def create_root(
    draft: Path, manifest: Manifest, attributes: Mapping[str, Any], groups: Sequence[GroupSchema]
) -> None:
    """Write the metadata of every group, and a manifest of nothing."""
    stamp = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run_id": manifest.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    create_group(draft, {**stamp, **attributes})
    for group in groups:
        _create_group(draft, group)
        manifest.axes[group.path] = group.axis
        manifest.rows[group.path] = 0
    manifest.write(draft)
    # Before the folder gets its name: what is there under that name outlasts a loss of power.
    sync_all(draft)


def sync_all(folder: Path) -> None:
    """fsync a new folder and everything in it, in threads: the disk takes what waits for it together."""
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(sync, [folder, *folder.rglob("*")]))


def _create_group(root: Path, schema: GroupSchema) -> None:
    folder = root / schema.path
    if folder.parent != root and not folder.parent.exists():
        create_group(folder.parent, {})
    tokens = schema.axis in ("token", "patch") and not schema.path.startswith("tokens/")
    labels = [a.name for a in schema.arrays if tokens and a.dims == (schema.axis,)]
    create_group(folder, {**schema.attrs, "coordinates": names_of([*labels, *schema.coords])})
    for array in schema.arrays:
        create_array(folder / array.name, array, schema.axis)
    for name, values in schema.coords.items():
        stored = zarr.create_array(
            str(folder / name),
            shape=values.shape,
            chunks=values.shape,
            dtype=values.dtype,
            dimension_names=[name],
        )
        stored[...] = values


def names_of(coords: Iterable[Any]) -> str:
    """The attribute `coordinates` of a group, by which xarray knows them."""
    return " ".join(sorted(str(name) for name in coords))
