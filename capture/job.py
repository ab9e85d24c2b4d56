"""A capture job: model + dataset -> run, in batches that depend on nothing but dataset and specification."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechanistic.store import RunWriter, read_manifest
from mechanistic.store.errors import UsageError

from .backend import backend_of
from .batch_job import Job
from .dataset import Dataset
from .failures import failed_samples
from .interruption import Interruption
from .model_names import backend_named
from .models import LoadedModel, load_model
from .outputs import find_output, holds_something
from .parts import PartOf
from .price import Price, check_price
from .progress import Progress, human_bytes, human_seconds
from .run_description import CaptureSettings
from .specification import parse_sites


@dataclass(frozen=True)
class CaptureSummary:
    """What a job did: `captured` of the run's `samples` in this call; `failed` of them have no tokens.

    `retried` is how many that had failed were tried again in this call.
    """

    path: Path
    samples: int
    captured: int
    seconds: float
    stored_bytes: int
    failed: int = 0
    retried: int = 0

    def message(self) -> str:
        """What to tell the person who started it."""
        held = f"{self.path}: {self.samples} samples, {human_bytes(self.stored_bytes)}"
        failed = ""
        if self.failed:
            failed = f"; {self.failed} failed, which --retry-failed tries again"
        if self.retried:
            good = self.retried - self.failed
            failed = f"; {good} of the {self.retried} that had failed are made good"
        if not self.captured and not self.retried:
            return f"{held}; already finished, nothing to do{failed}"
        before = 0 if self.retried else self.samples - self.captured
        continued = f", continued after {before}" if before else ""
        return f"{held}; captured {self.captured} in {human_seconds(self.seconds)}{continued}{failed}"


def capture_run(
    model: str | LoadedModel,
    dataset: Dataset,
    path: str | Path,
    *,
    sites: Iterable[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 8,
    images: bool = True,
    seed: int = 0,
    part: tuple[int, int] | None = None,
    fail_fast: bool = False,
    retry_failed: bool = False,
    yes: bool = False,
    quiet: bool = False,
    log_json: bool = False,
    **loading: Any,
) -> CaptureSummary:
    """Capture a dataset into a run; an unfinished run of the same job is continued, a finished one kept.

    A sample that cannot be captured keeps its row, with status `failed` and the reason, and the job goes on.

    Parameters
    ----------
    model
        A name, folder or hub id for `load_model` (which gets `loading`), or a model that it returned.
    sites
        The specification; absent, `specification.DEFAULT_SITES`.
    images
        Whether the encoded images go into the run.
    seed
        Recorded with the job. Answers are greedy, so no result depends on it.
    part
        (index from 0, number of parts): only this slice of the dataset, as one part of the run at `path`.
    fail_fast
        Raise the error of the first sample that fails.
    retry_failed
        Try the failed samples of a run again, and append those that succeed.
    yes
        Go on where the estimate exceeds 100 GB.
    log_json
        Progress as a JSON object a line, for machines.

    Raises
    ------
    UsageError            options of loading, for a model that is loaded.
    OutputExistsError     `path` holds something else than this job's run, or another process is writing it.
    SpecificationError    a site does not parse, or the model does not have it.
    ModelError            the model cannot be loaded or cannot be captured.
    DatasetError          the dataset is broken; with `fail_fast` ImageError, the windows before committed.
    CaptureError          what the model computes is not what was proven.
    DiskFullError         the job does not fit, or did not.
    """
    begun = time.monotonic()
    _require_unloaded(model, loading)
    settings = CaptureSettings(parse_sites(sites), batch_size, max_new_tokens, images, seed)
    own = PartOf(*part) if part else None
    held, finished = find_output(Path(path), known(model, loading), dataset, settings.to_dict(), own)
    if finished and not (retry_failed and failed_samples(held)):
        return _summary(held, 0, begun)
    with _running(model, loading) as loaded:
        # A merged run of the same job is no longer in parts.
        job = Job(loaded, dataset, Path(path), settings, own if held != Path(path) else None)
        if not holds_something(held):
            check_price(job.price, yes=yes)
        before = read_manifest(held).samples if finished else None
        with Interruption() as interruption:
            if not finished:
                before = _capture(job, interruption, fail_fast=fail_fast, quiet=quiet, log_json=log_json)
            failed = failed_samples(held) if retry_failed else []
            if failed:
                names = [each.sample_id for each in failed]
                with job.open() as writer, _progress(writer, len(names), 0, quiet, log_json) as progress:
                    job.retry(writer, names, progress, interruption)
    return _summary(held, read_manifest(held).samples - (before or 0), begun, retried=len(failed))


def _require_unloaded(model: str | LoadedModel, loading: Mapping[str, Any]) -> None:
    if loading and isinstance(model, LoadedModel):
        raise UsageError(
            f"{', '.join(loading)}: this is for loading a model, and {model.name} is loaded.",
            "Give it to load_model, or give the model's name; how many samples there are is the dataset's.",
        )


@contextmanager
def _running(model: str | LoadedModel, loading: dict[str, Any]) -> Iterator[LoadedModel]:
    """A model that was given, which is its owner's; or one loaded for this job, and let go of behind it."""
    if not isinstance(model, str):
        yield model
        return
    loaded = load_model(model, **loading)
    try:
        yield loaded
    finally:
        backend_of(loaded).close()


def _capture(job: Job, interruption: Interruption, *, fail_fast: bool, quiet: bool, log_json: bool) -> int:
    with job.open() as writer:
        before = writer.samples
        with _progress(writer, writer.manifest.expected, before, quiet, log_json) as progress:
            try:
                job.run(writer, progress, interruption, fail_fast=fail_fast)
            except (KeyboardInterrupt, SystemExit):
                held = f"{writer.manifest.samples} of {writer.manifest.expected} samples are committed"
                progress.say(f"{job.path}: {held}; the same command continues after them")
                raise
    return before


@contextmanager
def _progress(writer: RunWriter, total: int, done: int, quiet: bool, log_json: bool) -> Iterator[Progress]:
    progress = Progress(total, done, quiet=quiet, log_json=log_json)
    try:
        yield progress
    finally:
        progress.close(writer.bytes_written)


def known(model: str | LoadedModel, loading: Mapping[str, Any]) -> dict[str, str]:
    """What the run's attribute `model` will say, as far as is known before the model is loaded."""
    if isinstance(model, LoadedModel):
        return {"name": model.name, "backend": model.backend, "dtype": model.dtype}
    told = {"name": model, "backend": backend_named(model, loading.get("backend"))}
    return {**told, "dtype": loading["dtype"]} if loading.get("dtype") else told


def _summary(path: Path, captured: int, begun: float, *, retried: int = 0) -> CaptureSummary:
    manifest = read_manifest(path)
    failed = len(failed_samples(path))
    seconds = time.monotonic() - begun
    return CaptureSummary(path, manifest.samples, captured, seconds, manifest.stored_bytes, failed, retried)


def price_run(
    model: str | LoadedModel,
    dataset: Dataset,
    path: str | Path,
    *,
    sites: Iterable[str] | None = None,
    max_new_tokens: int = 8,
    images: bool = True,
    **loading: Any,
) -> Price:
    """What `capture_run` would cost on disk: a few prompts are encoded, no forward runs. Raises like it."""
    _require_unloaded(model, loading)
    settings = CaptureSettings(parse_sites(sites), max_new_tokens=max_new_tokens, images=images)
    with _running(model, loading) as loaded:
        return Job(loaded, dataset, Path(path), settings).price
