"""What is inside a run, for a person and for a machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .location import is_url
from .lock import writer_of
from .manifest import Manifest
from .parts import part_count, read_parts, unfinished
from .reader import derived_names, group, open_run, read_manifest

_MODEL = ("dtype", "quantization", "backend", "attention")
_PART = re.compile(r"^parts/\d+/")


def run_info(path: str | Path) -> dict[str, Any]:
    """Model, dataset, completeness and, per group, dimensions, dtype, raw and stored bytes.

    Reads metadata only, and works on a run that is still being written.
    """
    manifest = read_manifest(path)
    run = open_run(path, allow_partial=True)
    attrs = dict(run.attrs)
    parts = part_count(path)
    groups = {}
    sizes = [(_PART.sub("", file), size) for file, (size, _) in manifest.files.items()]
    for name in manifest.axes:
        data = group(run, name)
        stored = sum(size for file, size in sizes if file.startswith(f"{name}/"))
        groups[name] = _group_info(data, stored)
    return {
        "path": str(path),
        "run_id": manifest.run_id,
        "state": manifest.state,
        "parts": parts,
        "unfinished": unfinished(read_parts(path, parts)) if parts else "",
        "writers": _writers(str(path), parts, manifest),
        "samples": manifest.samples,
        "samples_expected": manifest.expected,
        "stored_bytes": manifest.stored_bytes,
        "raw_bytes": sum(entry["raw_bytes"] for entry in groups.values()),
        "content_sha256": manifest.content_sha256() if manifest.complete else None,
        "format_version": attrs.pop("format_version", None),
        "created": attrs.pop("created", None),
        **{key: attrs.get(key) for key in ("model", "dataset", "capture", "proven", "licence", "software")},
        "derived": derived_names(run),
        "groups": groups,
    }


def _writers(path: str, parts: int | None, manifest: Manifest) -> list[str]:
    """Who is writing the run, or parts of it, at this moment."""
    if manifest.complete or is_url(path):
        return []
    if parts is None:
        return [who for who in [writer_of(Path(path))] if who is not None]
    each = [(part.index, writer_of(Path(part.path))) for part in read_parts(path, parts)]
    return [f"part {index}: {who}" for index, who in each if who is not None]


def _group_info(data: xr.Dataset, stored: int) -> dict[str, Any]:
    main = max(data.data_vars.values(), key=lambda v: v.ndim, default=None)
    return {
        "dims": {str(dim): int(size) for dim, size in data.sizes.items()},
        "arrays": sorted(str(name) for name in data.data_vars),
        "dtype": str(main.dtype) if main is not None and len(data.data_vars) == 1 else None,
        "tokens": data.attrs.get("tokens"),
        "raw_bytes": int(sum(v.size * _item_bytes(v.dtype) for v in data.variables.values())),
        "stored_bytes": stored,
    }


def _item_bytes(dtype: np.dtype[Any]) -> int:
    """Strings count as nothing raw: their length is not in the metadata."""
    return 0 if dtype.kind in "TOU" else dtype.itemsize


def format_info(info: dict[str, Any]) -> str:
    """The same as a page of text."""
    model, dataset = info["model"] or {}, info["dataset"] or {}
    complete = "complete" if info["state"] == "complete" else "UNFINISHED"
    lines = [
        f"run      {info['path']}  ({info['run_id']}, format {info['format_version']}, {info['created']})",
        f"model    {model.get('name', '?')}  {_details(model, _MODEL)}",
        f"dataset  {dataset.get('name', '?')}  {_details(dataset, ('split', 'hash'))}",
        f"samples  {info['samples']:,} of {info['samples_expected']:,}, {complete}{_parts(info)}",
        f"size     {human_bytes(info['stored_bytes'])} stored, {human_bytes(info['raw_bytes'])} raw"
        f" ({_ratio(info['raw_bytes'], info['stored_bytes'])})",
    ]
    if info["state"] != "complete":
        nobody = "nobody is writing; the same capture command continues it"
        lines.append(f"writer   {'; '.join(info['writers']) or nobody}")
    warnings = (info["proven"] or {}).get("warnings") or []
    lines += [f"WARNING  {warning}" for warning in warnings]
    if info["derived"]:
        lines.append(f"derived  {', '.join(info['derived'])}")
    rows = [("group", "dimensions", "dtype", "tokens", "raw", "stored", "ratio")]
    for name, entry in info["groups"].items():
        dims = " x ".join(f"{dim} {size:,}" for dim, size in entry["dims"].items())
        several = f"{len(entry['arrays'])} arrays"
        raw, stored = entry["raw_bytes"], entry["stored_bytes"]
        rows.append(
            (
                name,
                dims,
                entry["dtype"] or several,
                entry["tokens"] or "",
                human_bytes(raw),
                human_bytes(stored),
                _ratio(raw, stored),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, "", *table])


def human_bytes(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _parts(info: dict[str, Any]) -> str:
    if not info["parts"]:
        return ""
    lacking = f": {info['unfinished']}" if info["unfinished"] else ""
    return f", in {info['parts']} parts{lacking}"


def _details(attrs: dict[str, Any], keys: tuple[str, ...]) -> str:
    found = [f"{key} {str(attrs[key])[:16]}" for key in keys if attrs.get(key)]
    return f"({', '.join(found)})" if found else ""


def _ratio(raw: int, stored: int) -> str:
    return f"{raw / stored:.2f}x" if raw and stored else "-"
