"""Read whole samples of a run, a bounded block at a time, straight from its arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .growing import dimensions
from .manifest import Manifest

BLOCK_BYTES = 64 << 20

Rows = dict[str, dict[str, NDArray[Any]]]


class PartReader:
    """Reads whole samples of one run, a block at a time, straight from its arrays."""

    def __init__(self, run: Path, manifest: Manifest) -> None:
        self.samples = manifest.samples
        self.arrays: dict[str, dict[str, tuple[zarr.Array[Any], int]]] = {}
        self.edges: dict[str, NDArray[np.int64]] = {}
        root = zarr.open_group(str(run), mode="r", use_consolidated=False)
        for group, axis in manifest.axes.items():
            if axis is None:
                continue
            node: Any = root[group]
            self.arrays[group] = {
                name: (array, dimensions(array).index(axis))
                for name, array in node.arrays()
                if axis in dimensions(array)
            }
        for group in self.arrays:
            self._find_edges(group, manifest.axes[group], manifest.rows[group])
        for group in self.arrays:
            self._follow_pointers(group)

    def _find_edges(self, group: str, axis: str | None, rows: int) -> None:
        """Where each sample's rows begin: edges[s] to edges[s + 1]."""
        steps = np.arange(self.samples + 1)
        if "sample_index" in self.arrays[group]:
            index = np.asarray(self.arrays[group]["sample_index"][0][:rows])
            self.edges[group] = np.searchsorted(index, steps)
        elif axis == "sample":
            self.edges[group] = steps

    def _follow_pointers(self, group: str) -> None:
        """Groups without labels of their own, such as image_bytes/, belong to the rows that point at them."""
        for array, _ in self.arrays[group].values():
            target = array.attrs.get("points_into")
            if target in self.arrays and target not in self.edges:
                lengths = np.asarray(self.arrays[group]["length"][0][: self.edges[group][-1]])
                ends = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
                self.edges[str(target)] = ends[self.edges[group]]

    def block_end(self, first: int) -> int:
        """The sample before which a block of about BLOCK_BYTES from `first` on ends; one sample at least."""
        size: NDArray[np.float64] = np.zeros(self.samples + 1)
        for group, arrays in self.arrays.items():
            row = sum(
                array.dtype.itemsize * np.prod([n for i, n in enumerate(array.shape) if i != axis])
                for array, axis in arrays.values()
            )
            size += row * (self.edges[group] - self.edges[group][first])
        return min(max(first + 1, int(np.searchsorted(size, BLOCK_BYTES))), self.samples)

    def read(self, first: int, last: int, before: dict[str, int]) -> Rows:
        """The rows of samples `first` to `last`, pointers moved by the rows `before` this run."""
        rows: Rows = {}
        for group, arrays in self.arrays.items():
            start, stop = int(self.edges[group][first]), int(self.edges[group][last])
            rows[group] = {}
            for name, (array, axis) in arrays.items():
                values = np.asarray(array[(slice(None),) * axis + (slice(start, stop),)])
                target = array.attrs.get("points_into")
                if target is not None:
                    shift = np.asarray(before.get(str(target), 0), values.dtype)
                    values = np.where(values < 0, values, values + shift)
                rows[group][name] = values
        return rows
