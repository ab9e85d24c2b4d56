"""Recapture what is damaged in a run: exactly those samples, in the batches that they had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from mechanistic.store import RunWriter, read_manifest
from mechanistic.store.differences import differences
from mechanistic.store.errors import CorruptError, OutputExistsError, StoreError
from mechanistic.store.lock import release_lock, require_no_writer, take_lock
from mechanistic.store.manifest import Manifest
from mechanistic.store.part_reader import PartReader
from mechanistic.store.parts import part_count, part_path, part_span
from mechanistic.store.repair import (
    DamagedPlace,
    damaged_places,
    damaged_static_groups,
    put_back,
)

from .batch_attempts import attempt
from .batch_job import Job
from .dataset import Dataset
from .failures import SampleError, failed_rows
from .models import LoadedModel
from .parts import PartOf
from .run_description import CaptureSettings, run_attributes
from .specification import parse_sites
from .tables import Rows

# Each is one shard of one array, in memory until it is whole.
PLACES_AT_ONCE = 8


@dataclass(frozen=True)
class RepairSummary:
    """What was put back: arrays with their first row, samples computed again, whether bits are the same."""

    path: Path
    places: tuple[str, ...]
    samples: int
    same: bool

    def message(self) -> str:
        """What to tell the person who asked."""
        if not self.places:
            return f"{self.path} has no damaged files, nothing to do"
        held = f"{self.path}: {', '.join(self.places)} put back from {self.samples} samples"
        if self.same:
            return f"{held}; the content hash is what it was"
        return f"{held}; values differ in rounding from the lost ones, so the content hash is a new one"


def settings_of(capture: dict[str, Any]) -> CaptureSettings:
    """The settings that a run's attribute `capture` was made of."""
    names = ("batch_size", "max_new_tokens", "images", "seed")
    return CaptureSettings(parse_sites(capture["sites"]), **{name: capture[name] for name in names})


def repair_run(
    path: str | Path, loaded: LoadedModel | Callable[[], LoadedModel], dataset: Dataset
) -> RepairSummary:
    """Write every damaged or missing chunk file of a run again, with the model and dataset that it came from.

    Parameters
    ----------
    loaded
        The model, or what loads it, which is called once, and only if something is damaged.

    Raises
    ------
    OutputExistsError    model, dataset or settings are not those of the run; it says what differs. Or another
                         process is writing it.
    StoreError           the run is unfinished: capturing goes on by itself.
    CorruptError         the rows of a damaged array cannot be computed again.
    """
    run = Path(path)
    count = part_count(run)
    load = (lambda: loaded) if isinstance(loaded, LoadedModel) else cache(loaded)
    if count is None:
        return _repair(run, load, dataset, None)
    done = [
        _repair(Path(part_path(run, index)), load, dataset, PartOf(index, count)) for index in range(count)
    ]
    places = tuple(f"parts/{index:04d}/{place}" for index, each in enumerate(done) for place in each.places)
    return RepairSummary(run, places, sum(each.samples for each in done), all(each.same for each in done))


def _repair(
    run: Path, load: Callable[[], LoadedModel], dataset: Dataset, part: PartOf | None
) -> RepairSummary:
    require_no_writer(run)
    manifest = read_manifest(run)
    if not manifest.complete:
        raise StoreError(
            f"{run} is unfinished: {manifest.samples} of {manifest.expected} samples are committed.",
            "Finish it with its capture command first.",
        )
    places, static = damaged_places(run, manifest), damaged_static_groups(run, manifest)
    if not places and not static:
        return RepairSummary(run, (), 0, True)
    attributes = dict(zarr.open_group(str(run), mode="r", use_consolidated=False).attrs)
    repair = Repair(run, manifest, attributes, load(), dataset, part)
    lock = take_lock(run)
    try:
        done = repair.run(places)
    finally:
        release_lock(run, lock)
    return repair.static(static, done) if static else done


class Repair:
    """The repair of one plain run, or of one part."""

    def __init__(
        self,
        run: Path,
        manifest: Manifest,
        attributes: dict[str, Any],
        loaded: LoadedModel,
        dataset: Dataset,
        part: PartOf | None,
    ) -> None:
        self.path = run
        self.manifest = manifest
        settings = settings_of(attributes["capture"])
        self.job = Job(loaded, dataset, run, settings, part)
        wanted = run_attributes(loaded, dataset, settings, self.job.proof)
        if part is not None:
            own = part.attributes(len(dataset))
            wanted["capture"] = {**wanted["capture"], "part": own}
        different = differences(attributes, wanted)
        if different:
            raise OutputExistsError(
                f"{run} was captured with other settings: {'; '.join(different)}.",
                "Give the same model and dataset as when it was captured; nothing was touched.",
            )
        merged = attributes.get("merged_from_parts", 1)
        total = len(dataset)
        self.spans = [part_span(total, i, merged) for i in range(merged)] if part is None else [self.job.span]
        self.numbers = self._numbers()
        self._axes = {
            (group.path, array.name): array.dims.index(group.axis)
            for group in self.job.groups
            for array in group.arrays
        }

    def run(self, places: list[DamagedPlace]) -> RepairSummary:
        """Put back every place, some at a time."""
        touched: set[int] = set()
        same = True
        for first in range(0, len(places), PLACES_AT_ONCE):
            some = places[first : first + PLACES_AT_ONCE]
            touched |= self._fill(some)
            self.manifest, unchanged = put_back(self.path, self.manifest, some)
            same = same and unchanged
        names = tuple(f"{place.group}/{place.array}[{place.start}]" for place in places)
        return RepairSummary(self.path, names, len(touched), same)

    def static(self, groups: list[str], done: RepairSummary) -> RepairSummary:
        """Write the groups that do not grow again, on top of what is `done`."""
        before = self.manifest.content_sha256()
        with RunWriter.resume(self.path, {}) as writer:
            self.job.put_readout(writer)
            writer.finish()
        same = done.same and read_manifest(self.path).content_sha256() == before
        return RepairSummary(self.path, (*done.places, *groups), done.samples, same)

    def _fill(self, places: list[DamagedPlace]) -> set[int]:
        """Compute the samples of these places again; returns which rows of samples/ they were."""
        edges = self._edges(places)
        wanted = set(range(self.manifest.samples))
        if edges is not None:
            wanted = {
                row
                for place in places
                for row in range(self.manifest.samples)
                if edges[place.group][row] < place.stop and edges[place.group][row + 1] > place.start
            }
        seen = dict.fromkeys(self.manifest.rows, 0)
        for row, rows in self._recaptured(wanted):
            begin = {group: int(each[row]) for group, each in edges.items()} if edges is not None else seen
            placed = self.job.placed(rows, {**begin, "samples": row})
            for place in places:
                axis = self._axes[place.group, place.array]
                place.fill(np.asarray(placed[place.group][place.array]), begin[place.group], axis)
            if edges is None:
                for group in seen:
                    name, values = next(iter(rows[group].items()))
                    seen[group] += len(values[0] if self._axes[group, name] else values)
        return wanted

    def _recaptured(self, wanted: set[int]) -> Iterator[tuple[int, Rows]]:
        """(row of samples/, its rows counted from their own 0), in order, each from the batch that it had."""
        number_rows: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            number_rows.setdefault(number, []).append(row)
        for span in self.spans:
            again: list[tuple[int, Rows]] = []
            for window in self.job.windows(span):
                if not any(row in wanted for number in window for row in number_rows[number]):
                    continue
                pieces = self._window(window, {n for n in window if wanted & set(number_rows[n])})
                for number in window:
                    rows = number_rows[number]
                    if rows[0] in wanted:
                        yield rows[0], pieces[number]
                    again += [(row, self._alone(number)) for row in rows[1:] if row in wanted]
            yield from sorted(again, key=lambda each: each[0])

    def _window(self, window: list[int], wanted: set[int]) -> dict[int, Rows]:
        samples = {number: self.job.dataset[number] for number in window}

        def failed(number: int, failure: SampleError) -> Rows:
            return failed_rows(samples[number], failure.error, self.job.groups)

        done: dict[int, Rows] = {}
        for batch in self.job.plan(window):
            if wanted & set(batch):
                done |= attempt(batch, self.job.captured, failed, print)
        return done

    def _alone(self, number: int) -> Rows:
        return self.job.captured([number])[0]

    def _edges(self, places: list[DamagedPlace]) -> Any:
        """Where each sample's rows begin in each group; None where the labels that say so are damaged."""
        if any(place.array in ("sample_index", "length") for place in places):
            return None
        try:
            return PartReader(self.path, self.manifest).edges
        except (ValueError, OSError, KeyError):
            return None

    def _numbers(self) -> list[int]:
        """The sample of the dataset that each row of samples/ is."""
        total = [number for span in self.spans for number in span]
        if self.manifest.samples == len(total):
            return total
        try:
            stored = zarr.open_array(str(self.path / "samples" / "sample_id"), mode="r")[...]
        except (ValueError, OSError) as cause:
            raise CorruptError(
                f"{self.path}: samples/sample_id is damaged, and failed samples were tried again.",
                "Which row is which sample is lost; capture the run again.",
            ) from cause
        known = {self.job.dataset[number].sample_id: number for number in total}
        return [known[str(name)] for name in np.asarray(stored).tolist()]
