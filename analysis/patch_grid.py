"""The patched forwards of a sweep: what has no number yet gets one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .patch_ends import PairEnds
from .patch_pairs import SamplePairs
from .patch_places import Tokens
from .patch_plan import PatchPlan

if TYPE_CHECKING:
    from mechanistic.capture.patch_sweep import Patch, PatchSweep

Floats = NDArray[np.float64]

# Bytes of known states that are held at a time.
MAX_BYTES = 256 << 20


def fill_grid(
    values: Floats,
    sweep: PatchSweep,
    plan: PatchPlan,
    pairs: SamplePairs,
    matched: Sequence[tuple[Tokens, Tokens]],
    ends: PairEnds,
    metric: str,
    quiet: bool,
) -> None:
    """Measure every patch that has no number yet: values (pair, layer, site, cell)."""
    from mechanistic.capture.forward_progress import forward_progress

    patches = [_patches(plan, pairs, matched, number) for number in range(len(pairs))]
    there = np.array([[each is not None for each in row] for row in patches])
    todo = np.isnan(values) & there[:, None, None, :]
    with forward_progress(int(there.sum() * values.shape[1] * values.shape[2]), quiet=quiet) as progress:
        progress.done = progress.first = progress.total - int(todo.sum())
        for chunk in _chunks(sweep, pairs):
            if not todo[chunk].any():
                continue
            chosen = {int(number) for numbers in (pairs.base, pairs.source) for number in numbers[chunk]}
            sweep.prepare(chosen, [(plan.stack, site, layer) for site in plan.sites for layer in plan.layers])
            for layer, site in np.ndindex(values.shape[1], values.shape[2]):
                where = [
                    (pair, int(cell)) for pair in chunk for cell in np.flatnonzero(todo[pair, layer, site])
                ]
                if where:
                    _measure(values[:, layer, site], where, sweep, plan, layer, site, patches, ends, metric)
                    progress.advance(len(where), 0, lambda: 0)


def _measure(
    values: Floats,
    where: list[tuple[int, int]],
    sweep: PatchSweep,
    plan: PatchPlan,
    layer: int,
    site: int,
    patches: list[list[Patch | None]],
    ends: PairEnds,
    metric: str,
) -> None:
    from mechanistic.capture.pair_metrics import measure

    chosen = [found for pair, cell in where if (found := patches[pair][cell]) is not None]
    for batch, logits in sweep.logits(plan.stack, plan.sites[site], plan.layers[layer], chosen):
        owner, cells = np.array(where[batch]).T
        clean, corrupt = (each[owner] for each in ends.tokens)
        measured = measure(metric, logits, clean, corrupt, ends.reference[owner])
        values[owner, cells] = measured.cpu().numpy()


def _patches(
    plan: PatchPlan, pairs: SamplePairs, matched: Sequence[tuple[Tokens, Tokens]], number: int
) -> list[Patch | None]:
    from mechanistic.capture.patch_sweep import Patch

    base, source = int(pairs.base[number]), int(pairs.source[number])
    found: list[Patch | None] = []
    for place in plan.places:
        rows = plan.rows(place, *matched[number])
        found += [
            None if rows is None else Patch(base, source, rows[0], rows[1], head) for head in plan.heads
        ]
    return found


def _chunks(sweep: PatchSweep, pairs: SamplePairs) -> Iterator[range]:
    """Pairs whose states fit into memory together."""
    longest = max(len(each.decoder[0]["position"]) for each in sweep.questions.values())
    row = sweep.loaded.anatomy.stack("text").width * 4
    size = max(1, MAX_BYTES // (2 * longest * row * sweep.kept_layers))
    for first in range(0, len(pairs), size):
        yield range(first, min(first + size, len(pairs)))
