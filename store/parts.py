"""A run that several writers captured: its parts, read as one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from .errors import FormatError, IncompleteRunError
from .location import read_file
from .manifest import MANIFEST, Manifest

PARTS = "parts"
DERIVED = "derived"
# Within it: sweeps whose results are not finished.
SWEEPS = ".sweeps"


@dataclass(frozen=True)
class Part:
    """One part of a run: `manifest` is None where it never ran."""

    index: int
    path: str
    manifest: Manifest | None


def part_path(run: str | Path, index: int) -> str:
    """Where a part of a run lies."""
    return f"{str(run).rstrip('/')}/{PARTS}/{index:04d}"


def root_attributes(run: str | Path) -> dict[str, Any]:
    """The attributes of a run's root, {} where there is none."""
    try:
        attributes: dict[str, Any] = json.loads(read_file(run, "zarr.json")).get("attributes", {})
    except (FileNotFoundError, ValueError, AttributeError):
        return {}
    return attributes


def part_count(run: str | Path) -> int | None:
    """How many parts an unmerged run has; None for a plain one, and for what is no run."""
    count = root_attributes(run).get(PARTS)
    return int(count) if count is not None else None


def read_parts(run: str | Path, count: int) -> list[Part]:
    """Every part in order, those that never ran too."""
    found = []
    for index in range(count):
        path = part_path(run, index)
        try:
            manifest: Manifest | None = Manifest.parse(read_file(path, MANIFEST), path)
        except FileNotFoundError:
            manifest = None
        found.append(Part(index, path, manifest))
    return found


def unfinished(parts: Sequence[Part]) -> str:
    """What is missing, such as 'part 3 never ran; part 5 has 20 of 25 samples'; '' if nothing is."""
    missing = [str(part.index) for part in parts if part.manifest is None]
    texts = [f"part{'s' * (len(missing) > 1)} {', '.join(missing)} never ran"] if missing else []
    texts += [
        f"part {part.index} has {part.manifest.samples} of {part.manifest.expected} samples"
        for part in parts
        if part.manifest is not None and not part.manifest.complete
    ]
    return "; ".join(texts)


def combined_manifest(run: str | Path, parts: Sequence[Part]) -> Manifest:
    """What is committed of the whole run, its files under their paths in it."""
    attributes = root_attributes(run)
    rows: dict[str, int] = {}
    axes: dict[str, str | None] = {}
    files: dict[str, tuple[int, int]] = {}
    samples = 0
    extra = 0
    for part in parts:
        if part.manifest is None:
            continue
        samples += part.manifest.samples
        axes |= part.manifest.axes
        extra += max(0, part.manifest.expected - part_samples(attributes, part.index, len(parts)))
        for group, count in part.manifest.rows.items():
            rows[group] = rows.get(group, 0) + count
        prefix = part_path("", part.index).strip("/")
        files |= {f"{prefix}/{name}": entry for name, entry in part.manifest.files.items()}
    return Manifest(
        run_id=str(attributes.get("run_id")),
        expected=int(attributes.get("dataset", {}).get("num_samples", samples)) + extra,
        samples=samples,
        state="writing" if unfinished(parts) else "complete",
        axes=axes,
        rows=rows,
        files=files,
    )


def part_samples(attributes: Mapping[str, Any], index: int, count: int) -> int:
    """How many samples of the dataset a part has."""
    return len(part_span(int(attributes.get("dataset", {}).get("num_samples", 0)), index, count))


def part_span(samples: int, index: int, count: int) -> range:
    """The contiguous slice of the dataset that a part is; sizes differ by one sample at most."""
    return range(samples * index // count, samples * (index + 1) // count)


def open_parts(
    run: str | Path, count: int, open_one: Callable[[str, bool], xr.DataTree], *, allow_partial: bool
) -> xr.DataTree:
    """The parts end to end, lazily; with `allow_partial`, as far as they are committed.

    Raises
    ------
    IncompleteRunError    a part is missing or unfinished and `allow_partial` is False; or none ever ran.
    """
    parts = read_parts(run, count)
    lacking = unfinished(parts)
    begun = [part for part in parts if part.manifest is not None]
    if (lacking and not allow_partial) or not begun:
        raise IncompleteRunError(
            f"{run} is a run of {count} parts, and {lacking}.",
            f"Run the same capture command with --parts {count} --part N for each, "
            "or open_run(..., allow_partial=True).",
        )
    manifests = [part.manifest for part in begun if part.manifest is not None]
    trees = [open_one(part.path, allow_partial) for part in begun]
    nodes = {node.path: node.to_dataset(inherit=False) for node in trees[0].subtree}
    for group, axis in manifests[0].axes.items():
        if axis is not None:
            held = [_dataset(tree, group) for tree in trees]
            nodes[f"/{group}"] = _end_to_end(held, axis, manifests)
    nodes |= open_derived(run)
    nodes["/"] = xr.Dataset(attrs=root_attributes(run))
    tree = xr.DataTree.from_dict(nodes)
    tree.encoding["source"] = str(run)
    return tree


def open_derived(run: str | Path) -> dict[str, xr.Dataset]:
    """The results that were stored with a run in parts, by path; {} where there are none."""
    try:
        read_file(run, f"{DERIVED}/zarr.json")
    except FileNotFoundError:
        return {}
    where = f"{str(run).rstrip('/')}/{DERIVED}"
    held = xr.open_datatree(where, engine="zarr", consolidated=True, chunks=None, cache=False)
    named = {node.path.strip("/"): node.to_dataset(inherit=False) for node in held.subtree}
    return {f"/{DERIVED}/{name}": result.chunk() for name, result in named.items() if name}


def _dataset(tree: xr.DataTree, group: str) -> xr.Dataset:
    node = tree[group]
    if not isinstance(node, xr.DataTree):
        raise FormatError(
            f"{group} is an array in one part and a group in another.", "The parts are damaged."
        )
    return node.to_dataset(inherit=False)


def _end_to_end(held: Sequence[xr.Dataset], axis: str, manifests: Sequence[Manifest]) -> xr.Dataset:
    shifted, before = [], dict.fromkeys(manifests[0].rows, 0)
    for dataset, manifest in zip(held, manifests, strict=True):
        moved = dataset
        for name, target in pointers(dataset).items():
            if target not in before:
                raise FormatError(
                    f"the array {name} points into {target!r}, which this run does not have.",
                    "The copy is incomplete or damaged: `mechanistic verify` lists what is wrong.",
                )
            # A variable, without the coordinates of a DataArray, which would come back unmoved.
            values = dataset[name].variable
            shifted_values = (values + (values >= 0) * before[target]).astype(values.dtype)
            shifted_values.attrs = values.attrs
            moved = moved.assign({name: shifted_values})
        shifted.append(moved)
        before = {group: rows + manifest.rows.get(group, 0) for group, rows in before.items()}
    if len(shifted) == 1:
        return shifted[0]
    joined: xr.Dataset = xr.concat(
        shifted,
        dim=axis,
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="override",
        combine_attrs="override",
    )
    return joined


def pointers(dataset: xr.Dataset) -> dict[str, str]:
    """The arrays whose values are row numbers of another group, and which group."""
    return {
        str(name): str(variable.attrs["points_into"])
        for name, variable in dataset.variables.items()
        if "points_into" in variable.attrs
    }
