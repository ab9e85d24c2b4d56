"""manifest.json: what of a run is committed. Replacing this one file is the commit."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import FormatError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """`rows` per group path, and every chunk file with its size in bytes and CRC-32.

    CRC-32, not the CRC-32C that ends every chunk: over data that ends in its own checksum, a CRC of the same
    polynomial is a constant.
    """

    run_id: str
    expected: int
    samples: int = 0
    state: str = "writing"
    axes: dict[str, str | None] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.state == "complete"

    @property
    def stored_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def content_sha256(self) -> str:
        """Hash of everything committed, derived/ and dates left out."""
        table = json.dumps([self.rows, sorted((k, *v) for k, v in self.files.items())], sort_keys=True)
        return hashlib.sha256(table.encode()).hexdigest()

    def finished(self) -> Manifest:
        return replace(self, state="complete")

    def to_dict(self) -> dict[str, Any]:
        groups = {path: {"axis": axis, "rows": self.rows.get(path)} for path, axis in self.axes.items()}
        return {
            "run_id": self.run_id,
            "state": self.state,
            "samples": self.samples,
            "samples_expected": self.expected,
            "groups": groups,
            "files": {path: list(entry) for path, entry in sorted(self.files.items())},
            "content_sha256": self.content_sha256() if self.complete else None,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        groups = data["groups"]
        return cls(
            run_id=data["run_id"],
            expected=data["samples_expected"],
            samples=data["samples"],
            state=data["state"],
            axes={path: group["axis"] for path, group in groups.items()},
            rows={path: group["rows"] for path, group in groups.items() if group["rows"] is not None},
            files={path: (int(size), int(crc)) for path, (size, crc) in data["files"].items()},
        )

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """Raises FormatError when the text is not a manifest."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise FormatError(
                f"{where}/{MANIFEST} is not a manifest ({type(cause).__name__}: {cause}).",
                "The run was damaged or is not ours; recapture it, or restore this file from its source.",
            ) from cause

    def write(self, run: Path) -> None:
        """Atomic and durable: the old manifest or the new one, never a mixture."""
        replace_file(run / MANIFEST, json.dumps(self.to_dict(), indent=1).encode())


def consolidate(run: Path, without: str | None = None) -> None:
    """Gather every node's metadata into the root's, so that one read opens the run, over HTTP too.

    Nodes below `without` are about to be removed.

    zarr-python's own consolidation lists the root folder and warns about every file in it that is no node.
    """
    found = sorted(p.parent.relative_to(run).as_posix() for p in run.rglob("zarr.json") if p.parent != run)
    nodes = [node for node in found if ".partial/" not in f"{node}/" and node.split("/")[0] != without]
    metadata = {node: json.loads((run / node / "zarr.json").read_bytes()) for node in nodes}
    for node in nodes:
        metadata[node].pop("consolidated_metadata", None)
        sync(run / node / "zarr.json")
    root = json.loads((run / "zarr.json").read_bytes())
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    replace_file(run / "zarr.json", json.dumps(root).encode())


def deconsolidate(run: Path) -> None:
    """Take back what `consolidate` and the end of a run wrote, since more rows will follow."""
    root = json.loads((run / "zarr.json").read_bytes())
    root.pop("consolidated_metadata", None)
    root["attributes"].pop("completeness", None)
    replace_file(run / "zarr.json", json.dumps(root).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename over, fsync the folder."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
