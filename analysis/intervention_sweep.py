"""A grid of interventions, each measured on every sample: what changes, and which answers turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .answer_change import AnswerChange
from .experiment import UNITS, Experiment, with_mean
from .sweep import Sweep

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
    """How every intervention is measured and summarised; the sweep keeps what was measured."""

    metric: Metric
    batch_size: int
    level: float
    seed: int
    quiet: bool
    sweep: Sweep

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
    batches = list(experiment.batches(how.batch_size, how.metric))
    forwards = len(batches) * (1 + int(np.prod(grid.shape)))
    with torch.no_grad(), how.sweep.steps(forwards, quiet=how.quiet) as step:
        for where, prepared in batches:
            batch = _Batch(where, prepared, grid, how.metric, change)
            found = step(batch.clean)
            clean[where], confidence[where] = found["value"], found["confidence"]
            change.first[where] = found["choice"]
            for index in np.ndindex(*grid.shape):
                found = step(partial(batch.changed, index))
                place: tuple[Any, ...] = (where, *index)
                changed[place], change.chosen[place] = found["value"], found["choice"]
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


@dataclass(frozen=True)
class _Batch:
    """Some samples, prepared when something is measured that no killed sweep has left."""

    where: slice
    prepared: Callable[[], Trial]
    grid: InterventionGrid
    metric: Metric
    change: AnswerChange

    @cached_property
    def known(self) -> tuple[Trial, Any, Edits]:
        """The trial, its logits as it is, and what changes it."""
        trial, logits = self.prepared().known()
        return trial, logits, self.grid.edits(self.where, trial)

    def clean(self) -> Mapping[str, Any]:
        """What is measured without an intervention."""
        trial, logits, _ = self.known
        confidence = logits.softmax(-1).max(-1).values.double().cpu().numpy()
        return {**self._measured(trial, logits), "confidence": confidence}

    def changed(self, index: tuple[int, ...]) -> Mapping[str, Any]:
        """What is measured at one point of the grid."""
        trial, _, edits = self.known
        found = self._measured(trial, trial.logits(edits(index)))
        _require_numbers(found["value"], trial)
        return found

    def _measured(self, trial: Trial, logits: Any) -> dict[str, Any]:
        value = trial.metric_of(logits, self.metric)[0].double().cpu().numpy()
        return {"value": value, "choice": self.change.choice(self.where, trial, logits)}


def _require_numbers(values: NDArray[np.float64], trial: Trial) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"The answer of sample {trial.batch.samples[int(bad[0])].sample_id!r} is no number any more: the "
            "intervention made a state too large.",
            "Choose smaller strengths, or load the model in float32.",
        )
