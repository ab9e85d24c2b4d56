"""Pairs of samples, clean and corrupt, whose answers differ and whose tokens stand at the same positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .experiment import Experiment, trial_masks
from .minimal_pairs import minimal_pairs
from .token_places import BACKGROUND

if TYPE_CHECKING:
    from mechanistic.capture.trial import Trial

MIN_DIFFERENCE = 0.5

# Makes the clean and the corrupt trial of a batch of pairs.
PairTrials = Callable[[], tuple["Trial", "Trial"]]


@dataclass(frozen=True)
class AnswerPairs:
    """Samples `clean` and `corrupt`, by their numbers, and the logit difference of clean answer and corrupt
    answer in both runs; `dropped` pairs had nearly the same in both, and so have no share to recover."""

    experiment: Experiment
    numbers: tuple[tuple[int, int], ...]
    clean: NDArray[np.float64]
    corrupt: NDArray[np.float64]
    dropped: int

    @property
    def clusters(self) -> NDArray[np.str_]:
        """Which pairs belong together: those of one group."""
        return self.experiment.clusters[[first for first, _ in self.numbers]]

    def batches(self, batch_size: int) -> list[tuple[slice, PairTrials]]:
        """The pairs in batches, each with its place among all."""
        return list(pair_batches(self.experiment, self.numbers, batch_size))

    def dataset(self) -> xr.Dataset:
        """clean, corrupt (pair), with the samples' numbers and names as coordinates."""
        units = {"units": "logit"}
        samples = self.experiment.samples
        return xr.Dataset(
            {
                "clean": ("pair", self.clean, {**units, "long_name": "logit difference in the clean run"}),
                "corrupt": (
                    "pair",
                    self.corrupt,
                    {**units, "long_name": "logit difference in the corrupt run"},
                ),
            },
            {
                "clean_id": ("pair", [samples[first].sample_id for first, _ in self.numbers]),
                "corrupt_id": ("pair", [samples[second].sample_id for _, second in self.numbers]),
                "relation": ("pair", [samples[first].relation for first, _ in self.numbers]),
            },
            {**self.experiment.attrs, "n_pair": len(self.numbers), "n_dropped": self.dropped},
        )


def answer_pairs(
    experiment: Experiment,
    pairs: Sequence[tuple[int, int]] | None,
    *,
    min_difference: float,
    batch_size: int,
) -> AnswerPairs:
    """The pairs given by number (clean, corrupt), or the minimal pairs among the samples.

    Raises
    ------
    DataError       there are none; a pair's prompts have different lengths; all pairs agree to within
                    `min_difference` logits.
    DimensionError  a number that no sample has.
    """
    import torch

    chosen = _minimal(experiment) if pairs is None else [(int(a), int(b)) for a, b in pairs]
    size = len(experiment.samples)
    if outside := [number for pair in chosen for number in pair if not 0 <= number < size]:
        raise DimensionError(f"There is no sample {outside[0]}; there are {size}.", "Number them from 0.")
    clean, corrupt = np.empty(len(chosen)), np.empty(len(chosen))
    with torch.no_grad():
        for where, prepared in pair_batches(experiment, chosen, batch_size):
            base, source = prepared()
            clean[where] = base.measure("logit_diff")[0].cpu().numpy()
            corrupt[where] = source.measure("logit_diff")[0].cpu().numpy()
    kept = np.abs(clean - corrupt) >= min_difference
    if not kept.any():
        raise DataError(
            f"All {len(chosen)} pairs have nearly the same logit difference, clean and corrupt (at most "
            f"{np.abs(clean - corrupt).max():.2g} apart).",
            "There is nothing to recover: choose other pairs, a trained model, or a lower min_difference=.",
        )
    numbers = tuple(pair for pair, keep in zip(chosen, kept, strict=True) if keep)
    return AnswerPairs(experiment, numbers, clean[kept], corrupt[kept], int((~kept).sum()))


def pair_batches(
    experiment: Experiment, pairs: Sequence[tuple[int, int]], batch_size: int
) -> Iterator[tuple[slice, PairTrials]]:
    """Clean and corrupt samples of the pairs, in batches; both are asked for the clean one's answer.

    They are prepared when they are asked for; DataError where the prompts of a pair have different lengths.
    """
    samples = experiment.samples
    firsts = [samples[first] for first, _ in pairs]
    others = [samples[second] for _, second in pairs]
    foils = [
        other.answer if other.answer not in (None, first.answer) else None
        for first, other in zip(firsts, others, strict=True)
    ]
    asked = [
        replace(other, options=first.options, answer=first.answer)
        for first, other in zip(firsts, others, strict=True)
    ]
    bases = replace(experiment, samples=tuple(firsts)).batches(batch_size, "logit_diff", foils)
    sources = replace(experiment, samples=tuple(asked)).batches(batch_size, "log_prob")
    for (where, base), (_, source) in zip(bases, sources, strict=True):
        yield where, partial(_pair_trials, base, source)


def _pair_trials(clean: Callable[[], Trial], corrupt: Callable[[], Trial]) -> tuple[Trial, Trial]:
    base, source = clean(), corrupt()
    for row, tables in enumerate(zip(base.batch.decoder, source.batch.decoder, strict=True)):
        lengths = [len(table["position"]) for table in tables]
        if lengths[0] != lengths[1]:
            names = [repr(trial.batch.samples[row].sample_id) for trial in (base, source)]
            raise DataError(
                f"Samples {' and '.join(names)} have {lengths[0]} and {lengths[1]} tokens.",
                "Positions must correspond: use pairs of one length, or `patch` with roles.",
            )
    return base, replace(source, answers=base.answers)


def pair_masks(base: Trial, source: Trial, places: Sequence[str | int]) -> NDArray[np.bool_]:
    """Which tokens of a batch of pairs are at each place, (place, sample, token): at the place in either run,
    since things stand elsewhere in the other image; of the background in both. Raises like `place_masks`."""
    own, other = trial_masks(base, places), trial_masks(source, places)
    both = np.array([place == BACKGROUND for place in places])[:, None, None]
    return np.where(both, own & other, own | other)


def _minimal(experiment: Experiment) -> list[tuple[int, int]]:
    samples = experiment.samples
    width = max((len(sample.options) for sample in samples), default=0)
    options = [[*sample.options, *[""] * (width - len(sample.options))] for sample in samples]
    table = xr.Dataset(
        {
            **{
                name: ("sample", [getattr(sample, name) or "" for sample in samples])
                for name in ("group", "subject", "object", "answer")
            },
            "options": (("sample", "option"), np.array(options, object).reshape(len(samples), width)),
        }
    )
    found = [(int(pair[0]), int(pair[1])) for pair in minimal_pairs(table).pairs]
    if not found:
        raise DataError(
            f"There is no minimal pair among these {len(samples)} samples: none of one group, subject and "
            "object have opposite answers.",
            "Name the pairs by number: pairs=[(clean, corrupt), ...].",
        )
    return found
