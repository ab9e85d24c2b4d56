"""The patched forwards of a sweep, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .patch_ends import PairEnds
from .patch_pairs import SamplePairs
from .patch_places import Tokens
from .patch_plan import PATTERN, PatchPlan
from .sweep import Steps, Sweep

if TYPE_CHECKING:
    from mechanistic.capture.patch_sweep import Patch, PatchSweep

Floats = NDArray[np.float64]

# Bytes of known states that are held at a time.
MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class PatchGrid:
    """The patches of a plan on pairs of samples, and how their forwards are measured."""

    sweep: PatchSweep
    plan: PatchPlan
    pairs: SamplePairs
    matched: Sequence[tuple[Tokens, Tokens]]
    ends: PairEnds
    metric: str

    def measured(self, kept: Sweep, quiet: bool) -> Floats:
        """The metric of every patched forward (pair, layer, site, cell), NaN where nothing is patched."""
        shape = (len(self.plan.layers), len(self.plan.sites))
        patches = [self._patches(number) for number in range(len(self.pairs))]
        there = np.array([[each is not None for each in row] for row in patches])
        values = np.full((len(self.pairs), *shape, len(self.plan.cells)), np.nan)
        with kept.steps(int(there.sum() * np.prod(shape)), quiet=quiet) as step:
            for chunk in _chunks(self.sweep, self.plan, self.pairs):
                ready = cache(partial(self._prepare, chunk))
                owner, cell = np.nonzero(there[chunk])
                owner += chunk.start
                chosen = [each for pair in chunk for each in patches[pair] if each is not None]
                for layer, site in np.ndindex(*shape):
                    for at, patched in self._batches((layer, site), chosen, owner, ready, step):
                        values[owner[at], layer, site, cell[at]] = patched
        return values

    def _batches(
        self,
        at: tuple[int, int],
        patches: Sequence[Patch],
        owner: NDArray[np.int64],
        ready: Callable[[], None],
        step: Steps,
    ) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Numbers of patches at one layer and site, and their metric, batch by batch."""
        from mechanistic.capture.pair_metrics import measure

        seen = done = 0
        forwards: Iterator[tuple[Any, Any]] | None = None

        def compute() -> Mapping[str, Any]:
            nonlocal forwards
            if forwards is None:
                ready()
                layer, site = self.plan.layers[at[0]], self.plan.sites[at[1]]
                forwards = self.sweep.logits(self.plan.stack, site, layer, patches, seen)
            where, logits = next(forwards)
            pairs = owner[where]
            clean, corrupt = (each[pairs] for each in self.ends.tokens)
            measured = measure(self.metric, logits, clean, corrupt, self.ends.reference[pairs])
            return {"patch": np.array(where), "patched": measured.cpu().numpy()}

        while done < len(patches):
            found = step(compute, of="patch")
            yield found["patch"], found["patched"]
            done, seen = done + len(found["patch"]), seen + 1

    def _prepare(self, chunk: range) -> None:
        chosen = {int(number) for each in (self.pairs.base, self.pairs.source) for number in each[chunk]}
        sites = [(self.plan.stack, site, layer) for site in self.plan.sites for layer in self.plan.layers]
        self.sweep.prepare(chosen, sites)

    def _patches(self, number: int) -> list[Patch | None]:
        from mechanistic.capture.patch_sweep import Patch

        base, source = int(self.pairs.base[number]), int(self.pairs.source[number])
        found: list[Patch | None] = []
        for place in self.plan.places:
            rows = self.plan.rows(place, *self.matched[number])
            found += [
                None if rows is None else Patch(base, source, rows[0], rows[1], head)
                for head in self.plan.heads
            ]
        return found


def _chunks(sweep: PatchSweep, plan: PatchPlan, pairs: SamplePairs) -> Iterator[range]:
    """Pairs whose states fit into memory together."""
    longest = max(len(each.table(plan.stack)[0]["position"]) for each in sweep.questions.values())
    own = sweep.loaded.anatomy.stack(plan.stack)
    row = 4 * max(own.width, own.heads * longest if PATTERN in plan.sites else 0)
    size = max(1, MAX_BYTES // (longest * (2 * row * sweep.kept_layers + sweep.kept_keys)))
    for first in range(0, len(pairs), size):
        yield range(first, min(first + size, len(pairs)))
