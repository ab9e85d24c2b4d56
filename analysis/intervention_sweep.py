"""A grid of interventions, each measured on every sample: what changes, and which answers turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .answer_change import AnswerChange
from .experiment import UNITS, Experiment, with_mean

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial

# From a point of the grid to its edits.
Edits = Callable[[tuple[int, ...]], list[Any]]


@dataclass(frozen=True)
class InterventionGrid:
    """`coords` are the dimensions of the grid, in order, with their labels; `edits` of a batch are made once.

    `name` is what the metric under an intervention is called.
    """

    name: str
    coords: dict[str, Any]
    edits: Callable[[slice, Trial], Edits]

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions in order."""
        return tuple(self.coords)

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(len(labels) for labels in self.coords.values())


@dataclass(frozen=True)
class Measuring:
    """How every intervention is measured and summarised."""

    metric: Metric
    batch_size: int
    level: float
    seed: int
    quiet: bool

    def attrs(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"metric": self.metric, "level": self.level, "seed": self.seed}


def intervention_sweep(experiment: Experiment, grid: InterventionGrid, how: Measuring) -> xr.Dataset:
    """Measure a grid of interventions.

    Returns
    -------
    clean (sample), NAME (sample, *grid), effect = NAME - clean; mean_effect (*grid), with _low and _high.
    clean_accuracy (), accuracy, repaired, broken (*grid); clean_choice, answer_index (sample), choice
        (sample, *grid); confidence (sample): the highest probability of any word, without intervention.

    Raises
    ------
    DataError    an intervention makes the answer no number.
    """
    import torch

    size = len(experiment.samples)
    clean, changed, confidence = np.empty(size), np.empty((size, *grid.shape)), np.empty(size)
    change = AnswerChange(experiment.samples, grid.shape)
    with torch.no_grad():
        for where, index, trial, logits in _forwards(experiment, grid, how):
            value = trial.metric_of(logits, how.metric)[0].double().cpu().numpy()
            if index is None:
                clean[where] = value
                confidence[where] = logits.softmax(-1).max(-1).values.double().cpu().numpy()
                change.before(where, trial, logits)
                continue
            _require_numbers(value, trial)
            place: tuple[Any, ...] = (where, *index)
            changed[place] = value
            change.after(where, index, trial, logits)
    units, what = {"units": UNITS[how.metric]}, how.metric.replace("_", " ")
    dims = ("sample", *grid.dims)
    effect = changed - clean.reshape(-1, *[1] * len(grid.shape))
    confident = {"units": "1", "long_name": "probability of the likeliest word"}
    result = xr.Dataset(
        {
            "clean": ("sample", clean, {**units, "long_name": what}),
            grid.name: (dims, changed, {**units, "long_name": f"{what}, {grid.name.replace('_', ' ')}"}),
            "effect": (dims, effect, {**units, "long_name": f"change of {what}"}),
            "confidence": ("sample", confidence, confident),
        },
        {**grid.coords, **experiment.coordinates()},
    ).merge(change.dataset(grid.dims))
    result = with_mean(result, "effect", "mean_effect", experiment.clusters, level=how.level, seed=how.seed)
    return result.assign_attrs(experiment.attrs | how.attrs())


def _forwards(
    experiment: Experiment, grid: InterventionGrid, how: Measuring
) -> Iterator[tuple[slice, tuple[int, ...] | None, Trial, Any]]:
    """Logits of every batch: as it is (no index), and at every point of the grid."""
    from mechanistic.capture.forward_progress import forward_progress

    if how.batch_size < 1:
        raise SpecificationError(f"batch_size is {how.batch_size}.", "Give 1 or more.")
    total = -(-len(experiment.samples) // how.batch_size) * (1 + int(np.prod(grid.shape)))
    with forward_progress(total, quiet=how.quiet) as progress:
        for where, trial in experiment.trials(how.batch_size, how.metric):
            trial, logits = trial.known()
            edits = grid.edits(where, trial)
            yield where, None, trial, logits
            progress.step()
            for index in np.ndindex(*grid.shape):
                yield where, index, trial, trial.logits(edits(index))
                progress.step()


def _require_numbers(values: NDArray[np.float64], trial: Trial) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"The answer of sample {trial.batch.samples[int(bad[0])].sample_id!r} is no number any more: the "
            "intervention made a state too large.",
            "Choose smaller strengths, or load the model in float32.",
        )
