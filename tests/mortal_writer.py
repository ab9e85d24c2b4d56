"""A writer of the small run, in a process of its own; a shared byte says whether it is inside a write."""

from __future__ import annotations

from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import small_run

from mechanistic.store import RunWriter, layout
from mechanistic.store.parts import part_path, part_span
from mechanistic.store.root import open_root

SAMPLES = 16
ATTRIBUTES: dict[str, Any] = {
    **small_run.ATTRIBUTES,
    "dataset": {"name": "made-up", "hash": "0", "num_samples": SAMPLES},
}


def small_layout() -> None:
    """Small shards and tables, so that the run has many files and a commit is short."""
    layout.CHUNK_BYTES = 256 * small_run.WIDTH * 4
    layout.SHARD_BYTES = 1
    layout.SHARD_ROWS_MIN = 512
    layout.TABLE_ROWS = 2000
    layout.BYTE_ROWS = 1 << 16


def write(path: Path, writing: Synchronized[int] | None = None, *, small: bool = True) -> None:
    """Write the run, or go on with it: a commit after every fourth sample."""
    if small:
        small_layout()
    _write(path, range(SAMPLES), writing)


def write_part(path: Path, index: int, count: int) -> None:
    """The same for one part."""
    small_layout()
    open_root(path, ATTRIBUTES, parts=count)
    _write(Path(part_path(path, index)), part_span(SAMPLES, index, count), None)


def _write(path: Path, span: range, writing: Synchronized[int] | None) -> None:
    if path.exists():
        writer = RunWriter.resume(path, ATTRIBUTES)
    else:
        writer = RunWriter.create(path, ATTRIBUTES, small_run.groups(), samples=len(span))
    if writer.manifest.complete:
        return
    with writer:
        while writer.samples < len(span):
            rows = sample_rows(span[writer.samples], writer.samples, writer.rows("image_bytes"))
            if writing is not None:
                writing.value = 1
            writer.append(rows, samples=1)
            if writer.samples % 4 == 0:
                writer.commit()
            if writing is not None:
                writing.value = 0
        if writing is not None:
            writing.value = 1
        writer.finish()


def sample_rows(sample: int, row: int, image_bytes: int) -> dict[str, dict[str, Any]]:
    """The rows of a sample, for a run in which it is number `row`."""
    rows = small_run.rows(sample)
    for columns in rows.values():
        if "sample_index" in columns:
            columns["sample_index"] = np.full_like(columns["sample_index"], row)
    rows["images"]["start"] = np.array([image_bytes], np.int64)
    return rows
