"""The two ends of each pair of samples: what is measured of the clean run, and of the corrupt one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .patch_pairs import SamplePairs

if TYPE_CHECKING:
    from mechanistic.capture.pair_metrics import PairAnswers
    from mechanistic.capture.patch_sweep import PatchSweep

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairEnds:
    """The metric of both runs of each kept pair, and what it takes to measure a patched one.

    `origin` says what the metric of both runs was computed from.
    """

    clean: Floats
    corrupt: Floats
    keep: NDArray[np.bool_]
    least: float
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]]
    reference: Any
    origin: str

    @classmethod
    def of(
        cls,
        sweep: PatchSweep,
        pairs: SamplePairs,
        answers: PairAnswers | None,
        metric: str,
        min_difference: float | None,
        quiet: bool,
    ) -> PairEnds:
        import torch

        from mechanistic.capture.end_logits import end_logits
        from mechanistic.capture.pair_metrics import PAIR_METRICS, measure

        none = np.zeros(len(pairs), np.int64)
        tokens = (none, none) if answers is None else (answers.clean, answers.corrupt)
        logits, origin = end_logits(sweep, pairs.samples, quiet=quiet)
        clean, corrupt = (
            torch.stack([logits[int(number)] for number in numbers])
            for numbers in (pairs.clean, pairs.corrupt)
        )
        both = [measure(metric, each, *tokens, clean).cpu().numpy() for each in (clean, corrupt)]
        least = PAIR_METRICS[metric][1] if min_difference is None else min_difference
        apart = np.abs(both[0] - both[1])
        keep = apart >= least
        if not keep.any():
            raise DataError(
                f"All {len(pairs)} pairs have nearly the same {metric}, clean and corrupt (at most "
                f"{apart.max():.2g} apart).",
                "There is nothing to recover: choose other pairs, a trained model, or min_difference=.",
            )
        kept = tuple(each[keep] for each in tokens)
        reference = clean[torch.from_numpy(keep)]
        return cls(both[0][keep], both[1][keep], keep, least, (kept[0], kept[1]), reference, origin)
