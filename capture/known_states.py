"""Tensors of samples that are known already: read from a run, or seen in one forward of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
import xarray as xr
from dask.base import compute
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store import site as stored_site
from mechanistic.store.errors import MissingSiteError, ModelError

from .batch import Batch
from .interventions import Edit, intervening
from .models import LoadedModel
from .pattern_rows import Kept
from .residual import Halves
from .resumed_forward import joined_inputs, plain_logits

Wanted = tuple[str, str, int]


@dataclass(frozen=True)
class Rows:
    """Rows of one sample at one site and layer: values (row, ...), and the position of each."""

    positions: NDArray[np.int64]
    values: Tensor
    heads: tuple[int, ...] | None = None

    def lacking(self, positions: NDArray[np.int64]) -> bool:
        """Whether some of these positions are not among the rows."""
        return bool(np.setdiff1d(positions, self.positions).size)

    def at(self, positions: NDArray[np.int64], head: int | None = None) -> Tensor:
        """The rows at these positions, (row, ...); of one head, by its true number."""
        values = self.values[torch.from_numpy(np.searchsorted(self.positions, positions))]
        if head is None or self.heads is None:
            return values
        return values[:, self.heads.index(head)]


class KnownStates(Protocol):
    """Where the tensors of samples come from."""

    def prepare(self, samples: Iterable[int], wanted: Iterable[Wanted]) -> None:
        """Make ready what `rows` will be asked for next."""
        ...

    def rows(self, stack: str, site: str, layer: int, samples: Sequence[int]) -> dict[int, Rows]:
        """The rows of these samples."""
        ...

    def last_residual(self, sample: int) -> Tensor | None:
        """What leaves the last layer at the sample's last prompt token, (d_model,), where it is known."""
        ...


def require_same_model(run: xr.DataTree, loaded: LoadedModel) -> None:
    """ModelError unless the run was captured from these very weights, in the dtype they have now."""
    held = dict(run.attrs.get("model", {}))
    for key, what in (("weights_sha256", "weights"), ("dtype", "dtype")):
        got = getattr(loaded, key)
        if held.get(key) != got:
            raise ModelError(
                f"The run was captured from {held.get('name')!r} with {what} {str(held.get(key))[:16]}; "
                f"{loaded.name!r} has {what} {got[:16]}.",
                "Load the model and revision of the run (its attribute `model`), or capture this one.",
            )


@dataclass(frozen=True)
class StoredStates:
    """Read from a run. `depth` is how many layers the decoder has; `image_layers` as in `ResumedForward`:
    above, what leaves a layer enters the next. `patterns` gives rows of attention by stack, layer and sample.
    """

    run: xr.DataTree
    depth: int
    image_layers: int
    patterns: Callable[[str, int, int], Rows] | None = None
    _labels: dict[str, tuple[xr.Dataset, NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)

    def prepare(self, samples: Iterable[int], wanted: Iterable[Wanted]) -> None:
        """Nothing: all is there."""

    def find(self, stack: str, site: str, layer: int) -> tuple[str, int]:
        """The group and layer that hold a site; MissingSiteError with the command that captures it.

        What leaves a layer is read from what enters the next, and the other way round, where they are equal;
        a pattern is rebuilt from q and k where the run has both.
        """
        if site == "pattern":
            return self._find_pattern(stack, layer)
        candidates = [(site, layer)]
        if stack == "text" and site == "resid_pre" and layer > self.image_layers:
            candidates.append(("resid_post", layer - 1))
        if stack == "text" and site == "resid_post" and layer + 1 > self.image_layers:
            candidates.append(("resid_pre", layer + 1))
        for name, number in candidates:
            path = f"{stack}/{name}"
            if f"/{path}" in self.run.groups and number in self._site(path)[0]["layer"].values:
                return path, number
        raise self.missing(stack, site, f"layer {layer}")

    def _find_pattern(self, stack: str, layer: int) -> tuple[str, int]:
        if {f"/{stack}/q", f"/{stack}/k"} <= set(self.run.groups):
            self.find(stack, "q", layer)
            return self.find(stack, "k", layer)
        path = f"{stack}/pattern"
        if f"/{path}" in self.run.groups and layer in stored_site(self.run, path)["layer"].values:
            return path, layer
        raise self.missing(stack, "pattern", f"layer {layer}")

    def rows(self, stack: str, site: str, layer: int, samples: Sequence[int]) -> dict[int, Rows]:
        """The rows of these samples, read in one go."""
        path, number = self.find(stack, site, layer)
        if site == "pattern" and self.patterns is not None:
            return {each: self.patterns(stack, layer, each) for each in samples}
        data, owner, positions = self._site(path)
        place = int(np.flatnonzero(data["layer"].values == number)[0])
        array = data[path.partition("/")[2]].isel(layer=place)
        axis = str(array.dims[0])
        spans = {each: np.searchsorted(owner, [each, each + 1]) for each in samples}
        pieces = [array.isel({axis: slice(*span)}).data for span in spans.values()]
        head = next((name for name in ("head", "kv_head") if name in data.dims), None)
        heads = None if head is None else tuple(int(each) for each in data[head].values)
        found = {}
        for (each, span), values in zip(
            spans.items(), compute(*pieces, scheduler="synchronous"), strict=True
        ):
            found[each] = Rows(positions[slice(*span)], torch.from_numpy(np.array(values)), heads)
        return found

    def last_residual(self, sample: int) -> Tensor | None:
        """From the group of last tokens that a run keeps beside its residuals."""
        if "/text/resid_post_last" not in self.run.groups:
            return None
        data = stored_site(self.run, "text/resid_post_last")
        if self.depth - 1 not in data["layer"].values:
            return None
        place = int(np.flatnonzero(data["layer"].values == self.depth - 1)[0])
        rows = data["resid_post_last"].isel(layer=place, sample=sample)
        return torch.from_numpy(np.array(rows.values, np.float32))

    def missing(self, stack: str, site: str, what: str) -> MissingSiteError:
        """The error that a site, or some of its rows, were not captured."""
        about, model = self.run.attrs.get("dataset", {}), self.run.attrs.get("model", {})
        asked = list(self.run.attrs.get("capture", {}).get("sites", []))
        wanted = f"{stack}.*.{site}[all]"
        kept = [each for each in asked if not each.startswith(f"{stack}.") or f".{site}[" not in each]
        sites = " ".join(f"'{each}'" for each in [*kept, wanted])
        return MissingSiteError(
            f"this run does not hold {stack}/{site} of {what}.",
            f"Capture it: mechanistic capture --model-name {model.get('name')} --dataset {about.get('name')} "
            f"--num-samples {about.get('num_samples')} --sites {sites} --output-dir OTHER; "
            "or compute it again with recompute=True.",
        )

    def _site(self, path: str) -> tuple[xr.Dataset, NDArray[np.int64], NDArray[np.int64]]:
        if path not in self._labels:
            data = stored_site(self.run, path)
            owner, positions = (data[name].values.astype(np.int64) for name in ("sample_index", "position"))
            self._labels[path] = (data, owner, positions)
        return self._labels[path]


@dataclass(frozen=True)
class RecordedStates:
    """Seen in one plain forward of each sample, and kept until the next `prepare`."""

    loaded: LoadedModel
    questions: Mapping[int, Batch]
    halves: Mapping[str, Halves | None]
    _kept: dict[tuple[Wanted, int], Tensor] = field(default_factory=dict)

    def prepare(self, samples: Iterable[int], wanted: Iterable[Wanted]) -> None:
        """Run the samples, one at a time, and keep the wanted sites."""
        self._kept.clear()
        asked = list(dict.fromkeys(wanted))
        for number in dict.fromkeys(samples):
            edits = [Edit(*each[:1], each[2], each[1], self._keeper(each, number)) for each in asked]
            inputs, last = joined_inputs(self.loaded, [self.questions[number].inputs])
            with torch.no_grad(), intervening(self.loaded, edits, self.halves):
                plain_logits(self.loaded, inputs, last)

    def rows(self, stack: str, site: str, layer: int, samples: Sequence[int]) -> dict[int, Rows]:
        """What was seen of these samples."""
        found = {}
        for number in samples:
            values = self._kept[(stack, site, layer), number]
            found[number] = Rows(np.arange(len(values)), values, _all_heads(site, values))
        return found

    def last_residual(self, sample: int) -> Tensor | None:
        """Not known: nothing is read from the run."""
        return None

    def _keeper(self, wanted: Wanted, number: int) -> Kept:
        return Kept(wanted[1], partial(self._kept.__setitem__, (wanted, number)))


def _all_heads(site: str, values: Tensor) -> tuple[int, ...] | None:
    return tuple(range(values.shape[1])) if site in ("q", "k", "v", "z", "pattern") else None
