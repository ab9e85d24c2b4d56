"""The tasks that compute dissimilarity matrices of every layer from blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from numpy.typing import NDArray

from .group_means import group_means
from .noise_covariance import Scatter, Shrinkage, shrunk_covariance, whitener
from .rdm_kernels import Patterns, correlation_block, correlation_patterns, distance_block, distance_patterns
from .representation_rows import BLOCK_ROWS, RowBlocks, finite_rows, open_block


@dataclass(frozen=True)
class RdmPlan:
    """What each row is: its sample, condition `code`, `partition` (of `parts`) and group of the `noise`.

    `averaged` says that patterns are means over rows, not the rows themselves; `noise` is None where features
    are not whitened; `names` are the conditions', `layers` the layers' true numbers.
    """

    metric: str
    layers: tuple[int, ...]
    samples: NDArray[np.int64]
    names: NDArray[Any]
    code: NDArray[np.int64]
    partition: NDArray[np.int64]
    parts: int
    averaged: bool
    noise: NDArray[np.int64] | None
    shrinkage: Shrinkage

    @property
    def count(self) -> int:
        return len(self.names)


def dissimilarity_blocks(blocks: RowBlocks, plan: RdmPlan) -> list[Any]:
    """One lazy matrix (condition, condition) a layer; below the diagonal it mirrors what is above."""
    shared = delayed(plan, traverse=False)
    dtype = np.result_type(blocks.values.dtype, np.float32)
    return [_layer(blocks, plan, shared, place, dtype) for place in range(len(plan.layers))]


def _layer(blocks: RowBlocks, plan: RdmPlan, shared: Any, place: int, dtype: Any) -> Any:
    whiten = None
    if plan.noise is not None:
        whiten = delayed(_whitener)(blocks.of(place), blocks.starts, shared, place, dtype)
    starts = blocks.starts
    if plan.averaged:
        means = delayed(_means)(blocks.of(place), blocks.starts, shared, place, dtype)
        shift = delayed(_shift_of_means)(means)
        starts = [*range(0, plan.count, BLOCK_ROWS), plan.count]
        sources = [delayed(_some_means)(means, start, stop) for start, stop in pairwise(starts)]
    else:
        sources = blocks.of(place)
        shift = delayed(_shift_of_rows)(sources[0])

    def ready(number: int) -> Any:
        return delayed(_patterns)(sources[number], starts[number], shift, whiten, shared, place)

    sizes = np.diff(starts)
    everything = range(len(sizes))
    held = [ready(number) for number in everything] if plan.averaged or blocks.held else None
    grid: list[list[Any]] = [[None] * len(sizes) for _ in sizes]
    for first in everything:
        left = held[first] if held else ready(first)
        for second in range(first, len(sizes)):
            if held or first == second:
                task = delayed(_block)(left, held[second] if held else left, first == second, plan.metric)
            else:
                # Read inside the task: what is ready in advance of its turn would pile up.
                task = delayed(_block_with)(
                    left, sources[second], starts[second], shift, whiten, shared, place
                )
            block = da.from_delayed(task, (sizes[first], sizes[second]), dtype)
            grid[first][second] = block
            if first != second:
                grid[second][first] = block.T
    return da.block(grid)


def _means(blocks: list[Any], starts: list[int], plan: RdmPlan, place: int, dtype: Any) -> NDArray[Any]:
    """Means (partition, condition, feature) of one layer."""
    cell, cells = plan.partition * plan.count + plan.code, plan.parts * plan.count
    means = group_means(blocks, starts, plan.samples, plan.layers[place], cell, cells)
    return means.astype(dtype).reshape(plan.parts, plan.count, -1)


def _whitener(blocks: list[Any], starts: list[int], plan: RdmPlan, place: int, dtype: Any) -> NDArray[Any]:
    """The whitener (feature, feature) of one layer, in two passes over its rows."""
    assert plan.noise is not None
    groups = int(plan.noise.max()) + 1
    means = group_means(blocks, starts, plan.samples, plan.layers[place], plan.noise, groups).astype(dtype)
    scatter = Scatter(means.shape[1])
    for start, block in zip(starts, blocks, strict=False):
        rows = finite_rows(block, plan.samples[start:], plan.layers[place])
        scatter.add(rows, plan.noise[start : start + len(rows)], means)
    covariance = shrunk_covariance(scatter, groups=groups, shrinkage=plan.shrinkage)
    return whitener(covariance, plan.layers[place]).astype(dtype)


def _shift_of_means(means: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(means.mean(axis=(0, 1), dtype=np.float64))


def _shift_of_rows(block: Any) -> NDArray[np.float64]:
    # What is not finite is reported by the tasks that use the rows.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(open_block(block)[0].mean(axis=0, dtype=np.float64))


def _some_means(means: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    return means[:, start:stop]


def _patterns(
    source: Any,
    start: int,
    shift: NDArray[np.float64],
    whiten: NDArray[Any] | None,
    plan: RdmPlan,
    place: int,
) -> Patterns:
    """Of some means (partition, condition, feature), or of a block of rows that are conditions themselves."""
    number = plan.layers[place]
    values = source if plan.averaged else finite_rows(source, plan.samples[start:], number)[None]
    if plan.metric == "correlation":
        names = plan.names[start : start + values.shape[1]]
        return correlation_patterns(values[0], number, names)
    return distance_patterns(values, shift, whiten)


def _block(first: Patterns, second: Patterns, same: bool, metric: str) -> NDArray[Any]:
    return (correlation_block if metric == "correlation" else distance_block)(first, second, same)


def _block_with(
    first: Patterns,
    source: Any,
    start: int,
    shift: NDArray[np.float64],
    whiten: NDArray[Any] | None,
    plan: RdmPlan,
    place: int,
) -> NDArray[Any]:
    return _block(first, _patterns(source, start, shift, whiten, plan, place), False, plan.metric)
