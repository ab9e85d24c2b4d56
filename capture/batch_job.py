"""What a job is made of: sites, samples and model, resolved against each other, captured window by window."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mechanistic.store import RunWriter
from mechanistic.store.errors import MechanisticError, SpecificationError
from mechanistic.store.growing import Values
from mechanistic.store.root import open_root

from .adapters import adapter_of
from .backend import Captured, backend_of
from .batch import Batch
from .batch_attempts import attempt
from .batch_plan import batches, committable, windows
from .batch_rows import lengths, place_rows, split_rows
from .dataset import Dataset
from .failures import SampleError, failed_rows
from .forward import site_rows
from .interruption import Interruption
from .memory import free_memory
from .models import LoadedModel
from .outputs import holds_something
from .parts import PartOf
from .price import Price, price
from .progress import Progress
from .prompts import build_prompt
from .proof import Proof
from .read_ahead import ReadAhead
from .readout import with_heads
from .run_description import CaptureSettings, run_attributes, run_groups
from .sample_answers import sample_answers
from .sites import resolve_sites
from .survey import answer_words, survey
from .tables import Rows, image_rows, sample_rows
from .token_table import TokenTexts, joined
from .write_behind import WriteBehind

COMMIT_SECONDS = 60.0
PRICE_PROBES = 4


class Job:
    """One job, or one part of it; everything that its batches share is made once."""

    def __init__(
        self,
        loaded: LoadedModel,
        dataset: Dataset,
        path: Path,
        settings: CaptureSettings,
        part: PartOf | None = None,
    ) -> None:
        self.loaded = loaded
        self.backend = backend_of(loaded)
        self.dataset = dataset
        self.root = path
        self.settings = settings
        self.part = part
        self.path = part.path(path) if part else path
        self.span = part.span(len(dataset)) if part else range(len(dataset))
        self.sites = resolve_sites(settings.sites, loaded.anatomy, loaded.dtype)
        self.backend.check(self.sites)
        self.survey = survey(dataset)
        if not self.survey.has_images and any(site.stack.is_encoder for site in self.sites):
            raise SpecificationError(
                f"Vision sites were asked for, and no sample of {dataset.name} has an image.",
                "Ask for text sites only, or for a dataset with images.",
            )
        self.texts = TokenTexts(loaded.tokenizer)
        self._committed = 0.0
        self._ahead = ReadAhead()

    @cached_property
    def price(self) -> Price:
        """The price from a few samples spread over the dataset, with answers as long as they may get."""
        numbers = np.unique(np.linspace(0, len(self.dataset) - 1, PRICE_PROBES).astype(int))
        probes: list[Batch] = []
        for number in numbers.tolist():
            try:
                probes.append(self._prepare([number], generate=False))
            except SampleError:
                continue
        return price(
            self.sites, probes or [self.shown], len(self.span), self.path, images=self.settings.images
        )

    @cached_property
    def shown(self) -> Batch:
        """The first sample with images, or the first at all where none has, that can be captured."""
        numbers = range(self.survey.first_with_images, len(self.dataset))
        failure: MechanisticError | None = None
        for number in numbers:
            if self.survey.has_images and not self.dataset[number].images:
                continue
            try:
                return self._prepare([number])
            except SampleError as error:
                failure = failure or error.error
        assert failure is not None
        raise failure

    @cached_property
    def proof(self) -> Proof:
        """What is proven on that sample before anything is kept."""
        return self.backend.prove(self.shown, self.sites)

    @cached_property
    def groups(self) -> list[Any]:
        """The schema of every growing group."""
        return run_groups(self.sites, self.survey, self.settings, self.proof)

    def open(self) -> RunWriter:
        """Prove the model, then start the run or continue it."""
        attributes = run_attributes(self.loaded, self.dataset, self.settings, self.proof)
        # What the model does not have is refused before there is any folder.
        groups = self.groups
        if self.part:
            open_root(self.root, attributes, parts=self.part.count)
            part = self.part.attributes(len(self.dataset))
            attributes = {**attributes, "capture": {**attributes["capture"], "part": part}}
        if holds_something(self.path):
            return RunWriter.resume(self.path, attributes)
        return RunWriter.create(self.path, attributes, groups, samples=len(self.span))

    def run(
        self, writer: RunWriter, progress: Progress, interruption: Interruption, *, fail_fast: bool = False
    ) -> None:
        """Capture every sample that is not committed yet, then finish the run."""
        if writer.samples:
            progress.say(f"{self.path} has {writer.samples} of {len(self.span)} samples; continuing")
        done, self._committed = self.span.start + writer.samples, time.monotonic()
        plans = (self.plan(window) for window in self.windows(self.span) if window[-1] >= done)
        with WriteBehind() as behind:
            # The images that a window needs first are read while the model works on the one before.
            last: list[list[int]] = [[]]
            for plan, (then, *_) in pairwise(chain(plans, [last])):
                try:
                    rows = self._window_rows(plan, then, done, progress, interruption, fail_fast=fail_fast)
                    behind.put(partial(self._write, writer, rows, progress))
                    # Else they would stay in memory, written, until the next window is there.
                    del rows
                    interruption.check()
                except BaseException:
                    behind.wait()
                    writer.commit()
                    raise
        self.put_readout(writer)
        writer.finish()
        # Else a process keeps the room for a window and some shards, besides what its next job takes.
        free_memory()

    def retry(
        self, writer: RunWriter, sample_ids: Sequence[str], progress: Progress, interruption: Interruption
    ) -> None:
        """Try failed samples again and append those that succeed; all of them or, if it is killed, none."""
        wanted = set(sample_ids)
        numbers = [number for number in self.span if self.dataset[number].sample_id in wanted]
        for first in range(0, len(numbers), self.settings.batch_size):
            chosen = numbers[first : first + self.settings.batch_size]
            pieces = self.window(self.plan(chosen), progress, interruption, keep_failed=False)
            interruption.check()
            self.append(writer, [pieces[number] for number in chosen if number in pieces], progress)
        writer.expect(writer.samples)
        writer.finish()

    def _window_rows(
        self,
        plan: list[list[int]],
        then: list[int],
        done: int,
        progress: Progress,
        interruption: Interruption,
        *,
        fail_fast: bool,
    ) -> list[Rows]:
        """The rows of a window from sample `done` on, in order; after a signal of what of it is whole."""
        left = [batch for batch in plan if batch[-1] >= done]
        pieces = self.window(left, progress, interruption, then=then, fail_fast=fail_fast)
        ready = committable(plan, {*pieces, *range(self.span.start, done)})
        return [pieces[number] for number in ready if number >= done]

    def _write(self, writer: RunWriter, pieces: Sequence[Rows], progress: Progress) -> None:
        self.append(writer, pieces, progress)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            writer.commit()
            self._committed = time.monotonic()

    def append(self, writer: RunWriter, pieces: Sequence[Rows], progress: Progress) -> None:
        """Put the rows of whole samples behind those that the run has."""
        before, placed = {group.path: writer.rows(group.path) for group in self.groups}, []
        for rows in pieces:
            placed.append(self.placed(rows, before))
            for path, length in lengths(rows, self.groups).items():
                before[path] += length
        writer.append(*placed, samples=len(placed))
        tokens = sum(len(rows["tokens/text"]["position"]) for rows in pieces)
        progress.advance(len(pieces), tokens, lambda: writer.bytes_written)

    def windows(self, span: range) -> Iterator[list[int]]:
        """The samples of a span that are captured, then written, together; of every part the same."""
        return windows(span, self.settings.batch_size, self.price.sample)

    def plan(self, numbers: Sequence[int]) -> list[list[int]]:
        """The batches of a window."""
        samples = {number: self.dataset[number] for number in numbers}
        alike = adapter_of(self.loaded.model).equal_images
        return batches(samples, self.settings.batch_size, equal_images=alike)

    def window(
        self,
        plan: Sequence[list[int]],
        progress: Progress,
        interruption: Interruption,
        *,
        then: Sequence[int] = (),
        fail_fast: bool = False,
        keep_failed: bool = True,
    ) -> dict[int, Rows]:
        """The rows of these batches' samples by number, each from its own 0; after a signal, fewer.

        `then` are the samples whose images the next window needs first.
        """

        def failed(number: int, failure: SampleError) -> Rows:
            if fail_fast:
                raise failure.error
            progress.failed += 1
            progress.say(f"failed: {failure.what}")
            return failed_rows(self.dataset[number], failure.error, self.groups) if keep_failed else {}

        done: dict[int, Rows] = {}
        for batch, following in zip(plan, [*plan[1:], then], strict=True):
            if interruption.received is not None:
                break
            self._ahead.start({number: self.dataset[number] for number in following})
            done |= attempt(batch, self.captured, failed, progress.say)
        return {number: rows for number, rows in done.items() if rows}

    def captured(self, numbers: list[int]) -> list[Rows]:
        """The rows of each of these samples, captured together; SampleError if one cannot be."""
        samples = [self._ahead.sample(number, self.dataset[number]) for number in numbers]
        done = self.backend.capture(
            samples,
            self.sites,
            self.proof,
            max_new_tokens=self.settings.max_new_tokens,
            texts=self.texts,
        )
        return split_rows(self.rows(done), len(numbers), self.groups)

    def placed(self, rows: Rows, before: Mapping[str, int]) -> Rows:
        """The rows of one sample, for a run whose groups have `before` rows already."""
        return place_rows(rows, before, self.groups)

    def rows(self, captured: Captured) -> Rows:
        """Everything that a batch adds to the run, its pointers counted from the batch's own rows."""
        batch, settings = captured.batch, self.settings
        tokenizer, written = self.loaded.tokenizer, settings.max_new_tokens > 0
        answers = sample_answers(captured, tokenizer, options=self.survey.options, written=written)
        rows: dict[str, Mapping[str, Values]] = {
            "samples": sample_rows(batch, self.survey, **vars(answers)),
            "tokens/text": joined(batch.decoder),
        }
        if self.survey.has_images:
            rows["tokens/vision"] = joined(batch.encoder)
            if "qformer" in batch.further:
                rows["tokens/qformer"] = joined(batch.further["qformer"])
            rows |= image_rows(batch, 0, stored=settings.images)
        for site in self.sites:
            rows[site.label_group] = site_rows(site, batch)
            if site.key_group is not None:
                rows[site.key_group] = joined(batch.table("xk"))
        for group, values in captured.arrays.items():
            rows[group] = {**values, **rows.get(group, {})}
        return rows

    def _prepare(self, numbers: Sequence[int], *, generate: bool = True) -> Batch:
        samples = [self.dataset[number] for number in numbers]
        limit = self.settings.max_new_tokens
        return self.backend.prepare(samples, max_new_tokens=limit, generate=generate, texts=self.texts)

    def put_readout(self, writer: RunWriter) -> None:
        """Write what the logit lens needs, where the model has it."""
        if "text" not in self.loaded.anatomy.stacks:
            return
        prompt = build_prompt(self.loaded.processor, self.shown.samples[0])
        words = answer_words(self.loaded.tokenizer, prompt.text, self.survey.answers)
        built = self.backend.readout(words)
        if built is not None:
            writer.put_static("readout", *with_heads(*built, self.sites, self.proof.stacks["text"]))
