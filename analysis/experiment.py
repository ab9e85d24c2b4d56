"""What an experiment on a model starts from, and what its result says about where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError, SpecificationError
from mechanistic.store.schema import STATUS

from .chosen_numbers import chosen_numbers
from .intervals import bootstrap_interval
from .token_places import default_places, place_masks, place_name

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial

RESAMPLES = 2000


@dataclass(frozen=True)
class Experiment:
    """A model, the samples that it is asked, and the attributes that say so.

    `first` holds the first trial of the model, which has shown how its layers work, for the others.
    """

    loaded: Any
    samples: tuple[Any, ...]
    attrs: dict[str, Any]
    first: list[Trial] = field(default_factory=list, compare=False)

    @property
    def layers(self) -> int:
        """How many the decoder has."""
        return self.depth("text")

    def depth(self, stack: str) -> int:
        """How many layers a stack has. ModelError if there is no such stack."""
        return len(self.loaded.anatomy.stack(stack).layers)

    @property
    def clusters(self) -> NDArray[np.str_]:
        """Which samples belong together: those of one group; a sample without one is alone."""
        return np.array([each.group or f"sample {number}" for number, each in enumerate(self.samples)])

    def trials(
        self, batch_size: int, metric: Metric, foils: Sequence[str | None] | None = None
    ) -> Iterator[tuple[slice, Trial]]:
        """The samples in batches, each with its place among all. Raises like `prepare_trial`."""
        for where, prepared in self.batches(batch_size, metric, foils):
            yield where, prepared()

    def batches(
        self, batch_size: int, metric: Metric, foils: Sequence[str | None] | None = None
    ) -> Iterator[tuple[slice, Callable[[], Trial]]]:
        """The same, each prepared when it is first asked for."""
        if batch_size < 1:
            raise SpecificationError(f"batch_size is {batch_size}.", "Give 1 or more.")
        for start in range(0, len(self.samples), batch_size):
            where = slice(start, min(start + batch_size, len(self.samples)))
            yield where, partial(self._trial, where, metric, foils)

    def _trial(self, where: slice, metric: Metric, foils: Sequence[str | None] | None) -> Trial:
        from mechanistic.capture.trial import prepare_trial

        if where.start and not self.first:
            # A sweep that goes on in its middle starts from what the first batch shows, as it did before.
            self._trial(slice(where.stop - where.start), metric, foils)
        own = None if foils is None else foils[where]
        like = self.first[0] if self.first else None
        trial = prepare_trial(
            self.loaded, self.samples[where], start=where.start or 0, foils=own, metric=metric, like=like
        )
        if like is None or trial.resumed is not like.resumed:
            self.first[:] = [trial]
        return trial

    def coordinates(self, dim: str = "sample") -> dict[str, Any]:
        """The labels of the samples along `dim`."""
        return {
            "sample_id": (dim, [each.sample_id for each in self.samples]),
            "relation": (dim, [each.relation for each in self.samples]),
        }


def begin(model: Any, samples: Any) -> Experiment:
    """Load what is given by name, and make samples of a dataset, a list or a run that holds its images.

    Raises
    ------
    UsageError, DataError
                    these are no samples, or a run without its images.
    ModelError      the model cannot be loaded, or has no decoder.
    """
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    from mechanistic.capture.given import given_model, given_samples

    loaded = given_model(model, None, "LoadedModel(model, processor, 'mine')")
    loaded.anatomy.stack("text")
    if isinstance(samples, xr.DataTree):
        return Experiment(loaded, *_from_run(loaded, samples))
    chosen = given_samples(samples)
    attrs = _model_attrs(loaded) | {"n_sample": len(chosen)}
    if hasattr(samples, "fingerprint"):
        attrs |= {"dataset": samples.name, "dataset_hash": samples.fingerprint()}
    return Experiment(loaded, tuple(chosen), attrs)


def _from_run(loaded: Any, run: xr.DataTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The samples of a run that did not fail, and the attributes."""
    from mechanistic.capture.run_samples import run_samples

    status = group(run, "samples")["status"].values
    numbers = np.flatnonzero(status == STATUS["ok"]).tolist()
    if not numbers:
        raise DataError("This run holds no sample that did not fail.", "Capture it with --retry-failed.")
    dataset = run.attrs.get("dataset", {})
    attrs = _model_attrs(loaded) | {
        "n_sample": len(numbers),
        "dataset": dataset.get("name", ""),
        "dataset_hash": dataset.get("hash", ""),
        "run_id": run.attrs.get("run_id", ""),
    }
    return tuple(run_samples(run, numbers)), attrs


def _model_attrs(loaded: Any) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "model_revision": loaded.revision,
        "weights_sha256": loaded.weights_sha256,
        "dtype": loaded.dtype,
    }


def chosen_layers(
    experiment: Experiment, layers: int | Sequence[int] | None, stack: str = "text"
) -> list[int]:
    """The layers with these numbers, all for None. SpecificationError if one does not exist."""
    return chosen_numbers(layers, len(experiment.loaded.anatomy.stack(stack).layers), "layer", stack)


def chosen_heads(experiment: Experiment, heads: int | Sequence[int] | None, stack: str = "text") -> list[int]:
    """The heads with these numbers, all for None. SpecificationError if one does not exist."""
    return chosen_numbers(heads, experiment.loaded.anatomy.stack(stack).heads, "head", stack)


def layer_window(layer: int, window: int, count: int) -> range:
    """The layers of a window around `layer`, as ROME counts them: layer - window // 2 and so on."""
    return range(max(0, layer - window // 2), min(count, layer - (-window // 2)))


def trial_masks(trial: Trial, places: Sequence[str | int], stack: str = "text") -> NDArray[np.bool_]:
    """Which tokens of a trial are at each place: (place, sample, token). Raises like `place_masks`.

    In an encoder those of all samples lie end to end: (place, 1, token).
    """
    samples = trial.batch.samples
    extras = [sample.extra for sample in samples]
    masks = place_masks(trial.batch.table(stack), extras, places, [sample.sample_id for sample in samples])
    if stack == "text":
        return np.pad(masks, ((0, 0), (0, 0), (0, trial.width - masks.shape[2])))
    own = [masks[:, row, : each.stop - each.start] for row, each in enumerate(trial.crops)]
    return np.concatenate(own, axis=1)[:, None]


def require_stack(stack: str) -> None:
    """SpecificationError unless a stack is one that experiments change."""
    if stack not in ("text", "vision"):
        raise SpecificationError(
            f"There is no stack '{stack}' to change.", "Choose 'text', the decoder, or 'vision', the encoder."
        )


def places_of(
    experiment: Experiment, places: Sequence[str | int] | str | None, stack: str = "text"
) -> list[str | int]:
    """The places asked for; by default every role that all samples have.

    Raises
    ------
    DataError    samples have no role in common.
    """
    if isinstance(places, str | int):
        return [places]
    if places is not None:
        return list(places)
    tables, extras = [], []
    for _, trial in experiment.trials(8, "log_prob"):
        tables += trial.batch.table(stack)
        extras += [sample.extra for sample in trial.batch.samples]
    found = default_places(tables, extras)
    if not found:
        raise DataError("These samples have no role in common.", "Name places: places=['last', '@3'].")
    return list(found)


def place_names(places: Sequence[str | int]) -> list[str]:
    """Their names, for a coordinate."""
    return [place_name(place) for place in places]


def with_mean(
    result: xr.Dataset,
    name: str,
    mean: str,
    clusters: NDArray[Any],
    *,
    level: float,
    seed: int,
    dim: str = "sample",
) -> xr.Dataset:
    """Add the mean of a variable over samples, and its bootstrap interval by clusters of samples."""
    values = result[name].transpose(..., dim)
    low, high = bootstrap_interval(
        values.values, level=level, clusters=clusters, resamples=RESAMPLES, seed=seed
    )
    dims = values.dims[:-1]
    attrs = {"units": values.attrs.get("units", "1")}
    label = f"mean {values.attrs.get('long_name', name)}"
    result[mean] = (dims, values.values.mean(-1), {**attrs, "long_name": label})
    for end, bound in (("low", low), ("high", high)):
        text = f"{label}: {end} end of the {level:.0%} interval"
        result[f"{mean}_{end}"] = (dims, bound, {**attrs, "long_name": text})
    return result


UNITS = {"logit_diff": "logit", "prob": "1", "log_prob": "nat"}
