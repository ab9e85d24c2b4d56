"""Samples that cannot be captured: they keep their row, with the reason, and the job goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mechanistic.store import GroupSchema
from mechanistic.store.errors import CaptureError, MechanisticError
from mechanistic.store.parts import part_count, read_parts
from mechanistic.store.schema import STATUS

from .dataset import ImageError, Sample


class SampleError(CaptureError):
    """One sample of a batch cannot be captured: `row` is its place in the batch, `error` the reason."""

    def __init__(self, row: int, error: MechanisticError) -> None:
        super().__init__(error.what, error.hint)
        self.row = row
        self.error = error


@contextmanager
def naming(row: int) -> Iterator[None]:
    """What fails inside is the fault of the sample at this place of its batch."""
    try:
        yield
    except SampleError:
        raise
    except (ImageError, CaptureError) as error:
        raise SampleError(row, error) from error


def failed_rows(
    sample: Sample, error: MechanisticError, groups: Sequence[GroupSchema]
) -> dict[str, dict[str, NDArray[Any]]]:
    """What a failed sample adds: its row of samples/, NaN where a group has a row a sample, no tokens."""
    rows: dict[str, dict[str, NDArray[Any]]] = {}
    for group in groups:
        count = 1 if group.axis == "sample" else 0
        rows[group.path] = {
            array.name: np.full(
                array.shape(group.axis, count),
                array.fill_value,
                object if array.dtype == "string" else array.dtype,
            )
            for array in group.arrays
        }
    table = rows["samples"]
    options = table.pop("options")
    options[0, : len(sample.options)] = sample.options
    known: Mapping[str, Any] = {
        "sample_id": sample.sample_id,
        "question": sample.question,
        "answer": sample.answer or "",
        "relation": sample.relation,
        "subject": sample.subject,
        "object": sample.object,
        "group": sample.group,
        "answer_index": sample.answer_index,
        "status": STATUS["failed"],
        "error": error.what,
        "forward_samples": 0,
        **sample.extra,
    }
    for name, column in table.items():
        if name in known:
            column[0] = known[name]
    table["options"] = options
    return rows


@dataclass(frozen=True)
class FailedSample:
    """A sample that failed and was not captured since; `row` of samples/."""

    row: int
    sample_id: str
    error: str


def failed_samples(run: str | Path) -> list[FailedSample]:
    """The samples of a run that failed, but for those that a later row with the same id made good."""
    count = part_count(run)
    if count is None:
        return _failed(Path(run))
    found, before = [], 0
    for part in read_parts(run, count):
        if part.manifest is not None:
            found += [
                FailedSample(each.row + before, each.sample_id, each.error)
                for each in _failed(Path(part.path))
            ]
            before += part.manifest.samples
    return found


def _failed(run: Path) -> list[FailedSample]:
    samples: Any = zarr.open_group(str(run / "samples"), mode="r", use_consolidated=False)
    status = np.asarray(samples["status"][...])
    if not np.any(status == STATUS["failed"]):
        return []
    names = [str(name) for name in samples["sample_id"][...]]
    errors = samples["error"][...]
    good = {name for name, state in zip(names, status, strict=True) if state == STATUS["ok"]}
    return [
        FailedSample(row, names[row], str(errors[row]))
        for row in np.flatnonzero(status == STATUS["failed"]).tolist()
        if names[row] not in good
    ]
