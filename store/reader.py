"""Open a run: labelled, lazy, trimmed to what is committed. Nothing in a store is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import xarray as xr
import zarr
from xarray.core.indexing import LazilyIndexedArray

from .errors import FormatError, IncompleteRunError, MissingSiteError, UsageError
from .growing import dimensions
from .location import is_url, read_file
from .manifest import MANIFEST, Manifest
from .parts import DERIVED, combined_manifest, open_parts, part_count, read_parts
from .schema import FORMAT, FORMAT_VERSION
from .stored_array import StoredArray

STACKS = ("text", "vision", "vision_global", "qformer")
_HINT = "Check the path; `mechanistic capture` makes one."


def open_run(path: str | Path, *, allow_partial: bool = False) -> xr.DataTree:
    """Open a run from a folder or a URL; reads metadata only.

    Every array is a dask array in blocks of one layer x one shard of rows; labels are coordinates. The parts
    of an unmerged run are read end to end, as one.

    Parameters
    ----------
    allow_partial
        Also open a run that is still being written; it is cut to the samples that are committed, and parts
        that never ran are left out.

    Raises
    ------
    UsageError          nothing is there.
    FormatError         it is not a run, lacks groups that its manifest names, or its format is newer.
    IncompleteRunError  the run, or a part of it, is unfinished and `allow_partial` is False.
    """
    count = part_count(path)
    if count is None:
        return _open_plain(str(path), allow_partial)
    return open_parts(path, count, _open_plain, allow_partial=allow_partial)


def _open_plain(where: str, allow_partial: bool) -> xr.DataTree:
    manifest = read_manifest(where)
    if not manifest.complete and not allow_partial:
        raise IncompleteRunError(
            f"{where} is unfinished: {manifest.samples} of {manifest.expected} samples are committed.",
            "Run its capture command again to finish it, or open_run(..., allow_partial=True).",
        )
    tree = _open_tree(where, manifest)
    check_version(tree.attrs, where)
    missing = sorted(set(manifest.axes) - {node.path.strip("/") for node in tree.subtree})
    if missing:
        raise FormatError(
            f"{where} lacks {', '.join(missing)}, which its manifest names.",
            "The copy is incomplete: copy the folder again; `mechanistic verify` lists what is missing.",
        )
    stored = _stored_arrays(where, manifest)
    lazy = {}
    for node in tree.subtree:
        name = node.path.strip("/")
        lazy[node.path] = _label(_read_directly(node.to_dataset(inherit=False), name, stored), name, manifest)
    run = xr.DataTree.from_dict(lazy)
    run.encoding["source"] = where
    return run


def site(run: xr.DataTree, name: str) -> xr.Dataset:
    """The Dataset of one site, such as 'text/q'; MissingSiteError names the sites that exist."""
    path = name.replace(".", "/")
    if f"/{path}" in run.groups:
        return group(run, path)
    stack, _, wanted = path.partition("/")
    held = sites(run)
    raise MissingSiteError(
        f"this run has no {path!r}; it holds {', '.join(held) or 'no sites at all'}.",
        f"Capture it with --sites '{stack}.*.{wanted}'."
        if wanted
        else f"A site is named with its stack, such as 'text/{path}'.",
    )


def group(run: xr.DataTree, path: str) -> xr.Dataset:
    """The Dataset of any group, such as 'samples' or 'tokens/text'; KeyError when there is none."""
    node = run[path]
    if not isinstance(node, xr.DataTree):
        raise KeyError(f"{path!r} is an array of this run, not a group")
    return node.to_dataset(inherit=False)


def sites(run: xr.DataTree) -> list[str]:
    """The sites a run holds, such as ['text/k', 'text/q', 'text/resid_post']."""
    return sorted(
        path
        for path in (node.path.strip("/") for node in run.subtree)
        if path.count("/") == 1 and path.split("/")[0] in STACKS
    )


def derived_names(run: xr.DataTree) -> list[str]:
    """The results that were stored with a run afterwards, by their name in derived/."""
    paths = [node.path.split("/") for node in run.subtree]
    return sorted(path[2] for path in paths if len(path) == 3 and path[1] == DERIVED)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a run in a folder or at a URL; of an unmerged one, those of its parts together.

    Raises
    ------
    UsageError   nothing is at `path`.
    FormatError  something is, but it has no readable manifest.
    """
    where = str(path)
    count = part_count(path)
    if count is not None:
        return combined_manifest(path, read_parts(path, count))
    try:
        return Manifest.parse(read_file(path, MANIFEST), where)
    except FileNotFoundError:
        if is_url(where) or not Path(path).exists():
            hint = f"A run has a {MANIFEST} there." if is_url(where) else _HINT
            raise UsageError(f"there is no run at {where}.", hint) from None
        raise FormatError(
            f"{where} is not a mechanistic run: it has no {MANIFEST}.",
            "Give the folder that `mechanistic capture` wrote; open other Zarr stores with xarray itself.",
        ) from None


def check_version(attrs: Any, where: str) -> None:
    """FormatError for what is not a run, or is one of a newer major version (while 0.x: a newer minor)."""
    if attrs.get("format") != FORMAT:
        raise FormatError(
            f"{where} says its format is {attrs.get('format')!r}, not {FORMAT!r}.",
            "Give the folder that `mechanistic capture` wrote; open other Zarr stores with xarray itself.",
        )
    version = str(attrs.get("format_version"))
    try:
        newer = _rank(version) > _rank(FORMAT_VERSION)
    except ValueError:
        raise FormatError(
            f"{where} has the format version {version!r}.", "It must look like '0.1'."
        ) from None
    if newer:
        raise FormatError(
            f"{where} has format version {version}; this installation reads up to {FORMAT_VERSION}.",
            "Upgrade: pip install --upgrade mechanistic.",
        )


def _rank(version: str) -> tuple[int, ...]:
    major, minor = (int(part) for part in version.split("."))
    return (0, minor) if major == 0 else (major,)


def _open_tree(where: str, manifest: Manifest) -> xr.DataTree:
    try:
        if manifest.complete:
            return xr.open_datatree(where, engine="zarr", consolidated=True, chunks=None, cache=False)
        root = zarr.open_group(where, mode="r", use_consolidated=False)
        live = {name: _live_group(root, name, axis, manifest) for name, axis in manifest.axes.items()}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(root.attrs)), **live})
    except (ValueError, TypeError, KeyError, OSError, zarr.errors.BaseZarrError) as cause:
        raise FormatError(
            f"{where} cannot be read as a Zarr store ({type(cause).__name__}: {str(cause).splitlines()[0]}).",
            "The copy is incomplete or damaged: `mechanistic verify` lists what is wrong.",
        ) from cause


def _live_group(root: zarr.Group, name: str, axis: str | None, manifest: Manifest) -> xr.Dataset:
    """A group of an unfinished run, array by array: their lengths agree only in what is committed."""
    node = root[name]
    if not isinstance(node, zarr.Group):
        raise KeyError(f"{name} is not a group")
    variables = {}
    for key, array in node.arrays():
        dims = dimensions(array)
        rows = tuple(slice(manifest.rows[name]) if dim == axis else slice(None) for dim in dims)
        lazy = da.from_array(array, chunks=array.shards or array.chunks)[rows]
        variables[key] = xr.Variable(dims, lazy, dict(array.attrs), {"chunks": array.shards or array.chunks})
    coordinates = str(node.attrs.get("coordinates", "")).split()
    return xr.Dataset(variables, attrs=dict(node.attrs)).set_coords(
        [c for c in coordinates if c in variables]
    )


def _stored_arrays(where: str, manifest: Manifest) -> dict[str, StoredArray]:
    """The arrays of a complete run in a local folder that need no zarr-python to be read, by path."""
    if is_url(where) or not manifest.complete:
        return {}
    nodes: dict[str, Any] = json.loads(read_file(where, "zarr.json"))["consolidated_metadata"]["metadata"]
    arrays = {path: node for path, node in nodes.items() if node["node_type"] == "array"}
    found = {path: StoredArray.of(Path(where) / path, node) for path, node in arrays.items()}
    return {path: array for path, array in found.items() if array is not None}


def _read_directly(dataset: xr.Dataset, group: str, stored: Mapping[str, StoredArray]) -> xr.Dataset:
    """The same variables, of which those in `stored` are read from there."""
    direct = {}
    for name, variable in dataset.variables.items():
        array = stored.get(f"{group}/{name}")
        # An index is in memory already; what xarray decodes besides (scales, times) is its own to read.
        if array is None or name in dataset.indexes or array.attributes != variable.attrs:
            continue
        if (array.shape, array.dtype) == (variable.shape, variable.dtype):
            lazy = LazilyIndexedArray(array)
            direct[name] = xr.Variable(variable.dims, lazy, variable.attrs, variable.encoding)
    return dataset.assign(direct)


def _label(dataset: xr.Dataset, group: str, manifest: Manifest) -> xr.Dataset:
    """Cut to the committed rows, and give every variable its dask blocks."""
    axis = manifest.axes.get(group)
    if axis is None:
        return dataset.chunk() if dataset.variables else dataset
    rows = manifest.rows[group]
    chunks: dict[str, int] = {}
    for variable in dataset.variables.values():
        encoded = variable.encoding.get("shards") or variable.encoding.get("chunks") or variable.shape
        chunks |= {
            str(dim): int(size)
            for dim, size in zip(variable.dims, encoded, strict=True)
            if dim == axis and ("layer" in variable.dims or axis not in chunks)
        }
    trimmed = dataset.isel({axis: slice(0, rows)}) if axis in dataset.dims else dataset
    blocks = {dim: chunks.get(str(dim), 1 if dim == "layer" else -1) for dim in trimmed.dims}
    return trimmed.chunk(blocks)
