"""vLLM as a capture backend: one pass of the engine answers a batch and keeps what it computed on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError, ModelError

from .answers import end_ids, until
from .backend import Arrays, Captured
from .batch import Asked, Batch, answered, ask
from .dataset import Sample
from .failures import SampleError, naming
from .forward import in_stored_dtype, rows_of
from .models import LoadedModel
from .prompts import tokenizer_of
from .proof import TOLERANCE, Proof
from .row_sites import RowSites
from .sites import ResolvedSite
from .specification import ROW_SITES
from .token_table import TokenTexts, select
from .vllm_engine import Answer, Engine, Request
from .vllm_plan import Plan, check_sites, everything_wanted
from .vllm_proof import (
    check_layers,
    engine_call,
    join_halves,
    largest_change,
    masked,
    probed_tensors,
    prove_stack,
    report,
    warning_of,
)
from .vllm_readout import engine_readout
from .vllm_sampling import sampling
from .vllm_spool import Spool, heads_of


class VllmBackend:
    """See `backend.Backend`. `loaded` has the model's shapes on no device; weights are the engine's alone."""

    def __init__(self, start: Callable[[], Engine], loaded: LoadedModel) -> None:
        self._start = start
        self.loaded = loaded
        if "text" not in loaded.anatomy.stacks:
            raise ModelError(
                f"{loaded.name} has no decoder, and an engine runs nothing else.",
                "Capture it with --backend transformers.",
            )
        self.stack = loaded.anatomy.stack("text")
        self._watching: Any = None

    @cached_property
    def engine(self) -> Engine:
        """Started when it is first needed: a job is priced and refused without it."""
        engine = self._start()
        try:
            check_layers(engine.layers, self.stack, len(engine.workers))
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def _folder(self) -> Path:
        return Path(self.engine.folder.name)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self.loaded.dtype]

    def prepare(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        texts: TokenTexts,
        generate: bool = True,
    ) -> Batch:
        """See `Backend`."""
        asked = ask(self.loaded, samples)
        if not generate or not max_new_tokens:
            answers = [[0] * max_new_tokens for _ in samples]
        else:
            names = self.engine.names(len(samples))
            answers = self._answers(asked, names, max_new_tokens)
        return answered(self.loaded, asked, 0, answers, texts)

    def check(self, sites: Sequence[ResolvedSite]) -> None:
        """See `Backend`."""
        check_sites(sites)

    def prove(self, batch: Batch, attention: Collection[str]) -> Proof:
        """See `Backend`. Attention is looked at in any case: its mask may not be the model's own."""
        if self.loaded.dtype not in TOLERANCE:
            raise ModelError(
                f"This model computes in {self.loaded.dtype}, which cannot be captured.",
                f"Load it with dtype= one of {', '.join(TOLERANCE)}.",
            )
        begun, tolerance = time.monotonic(), self._tolerance
        full = Plan.everything(probed_tensors(["text"]), len(self.stack.layers))
        layout = batch.sequences[0]
        warnings: list[str] = []
        before = self._logits(batch)
        found = self._pass(batch, full, tolerance)
        with Spool(self._folder, len(self.engine.workers), tolerance) as spool:
            observed = spool.logits(1)[0]
            try:
                proof = prove_stack(spool, self.stack, layout, self.engine.layers, ["text"], tolerance)
            except CaptureError as error:
                if attention:
                    raise
                proof = prove_stack(spool, self.stack, layout, self.engine.layers, [], tolerance)
                warnings.append(f"how this engine masks was not established: {error.what}")
        join_halves(proof, found)
        after = self._logits(batch)
        change = max(largest_change(before, observed), largest_change(before, after))
        if change > tolerance:
            raise CaptureError(
                f"Observing this engine changes its logits by {change:.2g}.",
                "Report the vLLM version and the model.",
            )
        said = warning_of(self.loaded.model.config.model_type, proof, self.engine.layers[0]["kernel"])
        warnings += [said] if said else []
        return report(self.stack, proof, begun=begun, change=change, tolerance=tolerance, warnings=warnings)

    def _logits(self, batch: Batch) -> NDArray[np.float32]:
        """Logits behind prompt and answer of a batch of one, with nothing else kept."""
        self._pass(batch, Plan({}, {}), 0.0)
        with Spool(self._folder, len(self.engine.workers), self._tolerance) as spool:
            logits: NDArray[np.float32] = spool.logits(1)[0]
        return logits

    def _pass(self, batch: Batch, plan: Plan, probe: float) -> Any:
        """Read prompt and answer of a batch of one at once, into the spool; returns what probes found."""
        (name,) = self.engine.names(1)
        length = len(batch.sequences[0])
        tokens = [*self._tokens(batch.prompts[0].text), *batch.answers[0]]
        images = [image.pixels for image in batch.images[0]]
        self.watch(plan, None, probe)
        wanted = everything_wanted(length) if plan.layers else {}
        self.engine.call(
            "mechanistic_begin", {name: {"number": 0, "prompt_length": length, "wanted": wanted}}
        )
        (answer,) = self.engine.run([name], [Request(tokens, images)], sampling(self.loaded, 0))
        if answer.prompt != batch.decoder[0]["token_id"].tolist():
            raise _other_prompt(batch.samples[0], answer)
        return self.engine.call("mechanistic_write", str(self._folder))[0]["halves"]

    def watch(self, plan: Plan, halves: dict[str, Any] | None, probe: float = 0.0) -> None:
        """Have the workers keep what a plan names, if they do not already."""
        wanted = (plan, halves, probe)
        if self._watching != wanted:
            self._watching = None
            self.engine.call("mechanistic_watch", plan.to_dict(), halves, probe, str(self._folder))
            self._watching = wanted

    def unwatch(self) -> None:
        """Take every hook away; the next capture puts its own back."""
        if self._watching is not None:
            self.engine.call("mechanistic_unwatch")
            self._watching = None

    def capture(
        self,
        samples: Sequence[Sample],
        sites: Sequence[ResolvedSite],
        proof: Proof,
        *,
        max_new_tokens: int,
        texts: TokenTexts,
    ) -> Captured:
        """See `Backend`."""
        asked, plan = ask(self.loaded, samples), Plan.of(sites)
        halves = proof.halves["text"]
        self.watch(plan, None if halves is None else vars(halves))
        names = self.engine.names(len(samples))
        tables = [asked.table(self.loaded, row, row, (), texts) for row in range(len(samples))]
        expected = {
            name: {
                "number": row,
                "prompt_length": len(tables[row]["position"]),
                "wanted": plan.wanted(tables[row]),
            }
            for row, name in enumerate(names)
        }
        self.engine.call("mechanistic_begin", expected)
        answers = self._answers(asked, names, max_new_tokens)
        self.engine.call("mechanistic_write", str(self._folder))
        batch = answered(self.loaded, asked, 0, answers, texts)
        with Spool(self._folder, len(self.engine.workers), self._tolerance) as spool:
            arrays = self._arrays(spool, plan, sites, batch, proof)
            return Captured(batch, arrays, spool.logits(len(samples)))

    def _arrays(
        self, spool: Spool, plan: Plan, sites: Sequence[ResolvedSite], batch: Batch, proof: Proof
    ) -> Arrays:
        arrays: Arrays = {}
        for site in sites:
            if site.spec.site in ROW_SITES:
                continue
            name = site.spec.site
            wanted = [np.flatnonzero(select(columns, site.spec.tokens)) for columns in batch.decoder]
            shape = (len(site.layers), len(rows_of(site, batch)[0]), *site.row_shape)
            values = np.empty(shape, site.dtype)
            for place, layer in enumerate(site.layers):
                heads, target = heads_of(site, name), torch.from_numpy(values[place])
                rows = spool.rows(name, layer, plan.selection(name), wanted, heads, target)
                if site.heads is not None and len(site.heads) != heads:
                    rows = rows[:, list(site.heads)]
                stored = in_stored_dtype(rows, site, layer)
                if stored.data_ptr() != target.data_ptr():
                    target.copy_(stored)
            arrays[site.group] = {site.name: values}
        row_sites = RowSites(sites, batch)
        layers = {layer for each in row_sites.sites for layer in each.site.layers}
        lengths = [len(layout) for layout in batch.sequences]
        for layer in sorted(layers):
            rule = proof.rules["text"][layer]
            call = engine_call(spool, self.stack, self.engine.layers[layer], lengths, whole=False)
            row_sites.take("text", layer, masked(call, rule, batch.sequences), rule)
        return arrays | row_sites.finish()

    def _answers(self, asked: Asked, names: Sequence[str], limit: int) -> list[list[int]]:
        """Run the engine on prompts; answers without the end token and what comes after it."""
        requests = []
        for row, prompt in enumerate(asked.prompts):
            length = int(asked.encoded.lengths[row])
            with naming(row):
                self._check_length(asked.samples[row], length + limit + 1)
            requests.append(Request(self._tokens(prompt.text), [image.pixels for image in asked.images[row]]))
        done = self.engine.run(names, requests, sampling(self.loaded, limit))
        ends = end_ids(self.loaded.model, self.loaded.tokenizer)
        for row, answer in enumerate(done):
            if answer.prompt != asked.encoded.ids(row).tolist():
                raise SampleError(row, _other_prompt(asked.samples[row], answer))
        return [until(answer.tokens, ends)[:limit] for answer in done]

    def _check_length(self, sample: Sample, length: int) -> None:
        if length > self.engine.max_length:
            raise CaptureError(
                f"Sample {sample.sample_id!r}: prompt and answer may take {length} tokens, the engine takes "
                f"{self.engine.max_length}.",
                "Start it with --engine-option max_model_len=N, or leave the sample out.",
            )

    def _tokens(self, text: str) -> list[int]:
        """Token ids of a prompt with one placeholder an image, as `encode_prompts` tokenises it."""
        tokenizer = tokenizer_of(self.loaded.processor)
        bos = tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def readout(self, words: Mapping[int, str]) -> tuple[xr.Dataset, dict[str, Any]] | None:
        """See `Backend`."""
        return engine_readout(self.engine, self.loaded, words)

    def attributes(self) -> dict[str, Any]:
        """See `Backend`."""
        return {
            "attention": ", ".join(sorted({layer["kernel"] for layer in self.engine.layers})),
            "backend_version": self.engine.version,
            "engine_class": self.engine.workers[0]["model"],
        }

    def close(self) -> None:
        """See `Backend`."""
        if "engine" in vars(self):
            self.engine.close()


def _other_prompt(sample: Sample, answer: Answer) -> CaptureError:
    return CaptureError(
        f"Sample {sample.sample_id!r}: vLLM makes {len(answer.prompt)} tokens of its prompt, not those "
        "that the model's own processor makes.",
        "Its labels would be wrong. Capture this model with --backend transformers, and report it.",
    )
