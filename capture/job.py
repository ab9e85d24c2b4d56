"""A capture job: model + dataset -> run, in batches that depend on nothing but dataset and specification."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from mechanistic.store import RunWriter, read_manifest
from mechanistic.store.errors import OutputExistsError, SpecificationError
from mechanistic.store.schema import CORRECT
from mechanistic.store.writer import differences

from .answers import option_logits, option_tokens, score
from .batch import Batch, prepare_batch
from .dataset import Dataset
from .forward import capture_forward, site_rows
from .models import LoadedModel, load_model
from .price import Price, check_price, price
from .progress import Progress, human_bytes, human_seconds
from .prompts import build_prompt
from .proof import prove
from .readout import build_readout
from .row_sites import PatternStarts
from .run_description import CaptureSettings, dataset_attributes, run_attributes, run_groups
from .sites import resolve_sites
from .specification import parse_sites
from .survey import answer_words, survey
from .tables import Rows, image_rows, sample_rows
from .token_table import TokenTexts, joined

COMMIT_SECONDS = 60.0
PRICE_PROBES = 4


@dataclass(frozen=True)
class CaptureSummary:
    """What a job did: `captured` of the run's `samples` in this call."""

    path: Path
    samples: int
    captured: int
    seconds: float
    stored_bytes: int

    def message(self) -> str:
        """What to tell the person who started it."""
        held = f"{self.path}: {self.samples} samples, {human_bytes(self.stored_bytes)}"
        if not self.captured:
            return f"{held}; already finished, nothing to do"
        before = self.samples - self.captured
        continued = f", continued after {before}" if before else ""
        return f"{held}; captured {self.captured} in {human_seconds(self.seconds)}{continued}"


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
    yes: bool = False,
    quiet: bool = False,
    **loading: Any,
) -> CaptureSummary:
    """Capture a dataset into a run; an unfinished run of the same job is continued, a finished one kept.

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
    yes
        Go on where the estimate exceeds 100 GB.

    Raises
    ------
    OutputExistsError     `path` holds something else than this job's run.
    SpecificationError    a site does not parse, or the model does not have it.
    ModelError            the model cannot be loaded or cannot be captured.
    DatasetError          a sample or an image is broken; the batches before it are committed.
    CaptureError          what the model computes is not what was proven.
    DiskFullError         the job does not fit, or did not.
    """
    begun = time.monotonic()
    path = Path(path)
    settings = CaptureSettings(parse_sites(sites), batch_size, max_new_tokens, images, seed)
    if is_finished(path, model, dataset, settings):
        manifest = read_manifest(path)
        return CaptureSummary(path, manifest.samples, 0, time.monotonic() - begun, manifest.stored_bytes)
    loaded = load_model(model, **loading) if isinstance(model, str) else model
    job = Job(loaded, dataset, path, settings)
    if not holds_something(path):
        check_price(job.price(), yes=yes)
    with job.open() as writer:
        already = writer.samples
        job.run(writer, quiet=quiet)
    seconds = time.monotonic() - begun
    return CaptureSummary(path, writer.samples, writer.samples - already, seconds, writer.bytes_written)


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
    settings = CaptureSettings(parse_sites(sites), max_new_tokens=max_new_tokens, images=images)
    loaded = load_model(model, **loading) if isinstance(model, str) else model
    return Job(loaded, dataset, Path(path), settings).price()


def is_finished(path: Path, model: str | LoadedModel, dataset: Dataset, settings: CaptureSettings) -> bool:
    """Whether `path` holds this very job's finished run.

    OutputExistsError if it holds something else that is finished, or no run.

    An unfinished run is left for the writer to judge, which also compares what only a loaded model can tell.
    """
    if not holds_something(path):
        return False
    if not path.is_dir() or not (path / "manifest.json").is_file():
        raise OutputExistsError(
            f"{path} exists and is not a run.", "Choose another output folder; nothing there was touched."
        )
    if not read_manifest(path).complete:
        return False
    stored = dict(zarr.open_group(str(path), mode="r").attrs)
    known = {"name": model if isinstance(model, str) else model.name}
    wanted = {"capture": settings.to_dict()}
    different = differences(stored, wanted)
    for key, values in (("model", known), ("dataset", dataset_attributes(dataset))):
        held: Any = stored.get(key, {})
        different += [
            f"{key}.{name} is {held.get(name)!r}, not {value!r}"
            for name, value in values.items()
            if held.get(name) != value
        ]
    if different:
        raise OutputExistsError(
            f"{path} is a finished run of another job: {'; '.join(different)}.",
            "Choose another output folder; nothing there was touched.",
        )
    return True


def holds_something(path: Path) -> bool:
    """Whether a path exists and is not just an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


class Job:
    """One job's parts, each made once."""

    def __init__(self, loaded: LoadedModel, dataset: Dataset, path: Path, settings: CaptureSettings) -> None:
        self.loaded = loaded
        self.dataset = dataset
        self.path = path
        self.settings = settings
        self.sites = resolve_sites(settings.sites, loaded.anatomy, loaded.dtype)
        self.survey = survey(dataset)
        if not self.survey.has_images and any(site.stack.name == "vision" for site in self.sites):
            raise SpecificationError(
                f"Vision sites were asked for, and no sample of {dataset.name} has an image.",
                "Ask for text sites only, or for a dataset with images.",
            )
        self.texts = TokenTexts(loaded.tokenizer)

    def price(self) -> Price:
        """The price from a few samples spread over the dataset, with answers as long as they may get."""
        numbers = np.unique(np.linspace(0, len(self.dataset) - 1, PRICE_PROBES).astype(int))
        probes = [self._prepare(int(number), int(number) + 1, generate=False) for number in numbers]
        return price(self.sites, probes, len(self.dataset), self.path, images=self.settings.images)

    def open(self) -> RunWriter:
        """Prove the model on the first sample with images, then start the run or continue it."""
        attention = {site.stack.name for site in self.sites if site.heads is not None}
        shown = self.survey.first_with_images
        self.proof = prove(self.loaded, self._prepare(shown, shown + 1), attention)
        attributes = run_attributes(self.loaded, self.dataset, self.settings, self.proof)
        if holds_something(self.path):
            return RunWriter.resume(self.path, attributes)
        groups = run_groups(self.sites, self.survey, self.settings, self.proof)
        return RunWriter.create(self.path, attributes, groups, samples=len(self.dataset))

    def run(self, writer: RunWriter, *, quiet: bool) -> None:
        """Capture every batch that is not committed yet, then finish the run."""
        progress = Progress(len(self.dataset), writer.samples, quiet=quiet)
        if writer.samples:
            progress.say(f"{self.path} has {writer.samples} of {len(self.dataset)} samples; continuing")
        image_bytes = writer.manifest.rows.get("image_bytes", 0)
        starts = PatternStarts(writer.manifest.rows)
        committed = time.monotonic()
        try:
            for first in range(writer.samples, len(self.dataset), self.settings.batch_size):
                with keeping(writer):
                    batch = self._prepare(first, first + self.settings.batch_size)
                    rows = starts.shifted(self.rows(batch, image_bytes))
                writer.append(rows, samples=len(batch.samples))
                image_bytes += len(rows.get("image_bytes", {}).get("data", ()))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    writer.commit()
                    committed = time.monotonic()
                progress.advance(len(batch.samples), batch.tokens, writer.bytes_written)
            self._put_readout(writer)
            writer.finish()
        finally:
            progress.close(writer.bytes_written)

    def rows(self, batch: Batch, image_bytes: int) -> Rows:
        """Everything that a batch adds to the run; `image_bytes` is how many there are already."""
        arrays, logits = capture_forward(self.loaded, batch, self.sites, self.proof.halves, self.proof.rules)
        tokenizer = self.loaded.tokenizer
        predictions = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in batch.answers]
        options = [
            option_tokens(tokenizer, prompt.text, sample.options)
            for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
        ]
        rows: Rows = {
            "samples": sample_rows(
                batch,
                self.survey,
                predictions=predictions,
                correct=self._correct(predictions, batch),
                logits=option_logits(logits, options, self.survey.options),
                notes=[each.note for each in options],
            ),
            "tokens/text": joined(batch.decoder),
        }
        if self.survey.has_images:
            rows["tokens/vision"] = joined(batch.encoder)
            rows |= image_rows(batch, image_bytes, stored=self.settings.images)
        for site in self.sites:
            rows[site.label_group] = site_rows(site, batch)
        for group, values in arrays.items():
            rows[group] = {**values, **rows.get(group, {})}
        return rows

    def _prepare(self, first: int, last: int, *, generate: bool = True) -> Batch:
        samples = [self.dataset[number] for number in range(first, min(last, len(self.dataset)))]
        limit = self.settings.max_new_tokens
        return prepare_batch(
            self.loaded, samples, first, max_new_tokens=limit, generate=generate, texts=self.texts
        )

    def _correct(self, predictions: list[str], batch: Batch) -> list[int]:
        if not self.settings.max_new_tokens:
            return [CORRECT["unscored"]] * len(predictions)
        return [score(said, sample) for said, sample in zip(predictions, batch.samples, strict=True)]

    def _put_readout(self, writer: RunWriter) -> None:
        prompt = build_prompt(self.loaded.processor, self.dataset[0])
        words = answer_words(self.loaded.tokenizer, prompt.text, self.survey.answers)
        built = build_readout(self.loaded.anatomy, self.loaded.model, words)
        if built is not None:
            writer.put_static("readout", *built)


@contextmanager
def keeping(writer: RunWriter) -> Iterator[None]:
    """Commit what whole batches have appended when the next one fails or is interrupted."""
    try:
        yield
    except BaseException:
        writer.commit()
        raise
