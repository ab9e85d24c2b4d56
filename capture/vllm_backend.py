"""vLLM as a capture backend: one pass of the engine answers a batch and keeps what it computed on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError, ModelError

from .answers import end_ids, until
from .backend import Captured
from .batch import Asked, Batch, answered, ask
from .dataset import Sample
from .failures import naming
from .forward import in_stored_dtype
from .models import LoadedModel
from .prompts import tokenizer_of
from .proof import TOLERANCE, Proof
from .row_sites import RowSites
from .sites import ResolvedSite, attended
from .specification import ROW_SITES
from .token_table import TokenTexts, encoder_table, select
from .vllm_encoder_proof import encoder_calls
from .vllm_engine import Engine, Request
from .vllm_folders import Folders
from .vllm_plan import Plan, check_sites
from .vllm_proof import check_layers, engine_call, masked
from .vllm_prover import Prover, Single, check_prompt, request_of
from .vllm_readout import engine_readout
from .vllm_sampling import sampling
from .vllm_spool import Spool, heads_of, is_stored_as

Arrays = dict[str, dict[str, NDArray[Any]]]


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
        self._prover = Prover(self)

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

    @cached_property
    def _folders(self) -> Folders:
        return Folders(Path(self.engine.folder.name))

    def written(self) -> tuple[Spool, Mapping[str, Any]]:
        """What the workers kept of a batch, as they leave it now, and what they say of it."""
        lent = self._folders.take()
        told: Mapping[str, Any] = self.engine.call("mechanistic_write", str(lent.path))[0]
        return Spool(lent, len(self.engine.workers), self.tolerance), told

    @property
    def tolerance(self) -> float:
        """Share of the largest value by which what should be equal may differ."""
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
            # Hooks of an earlier job would not know these requests.
            self.unwatch()
            names = self.engine.names(len(samples))
            answers = self._answers(asked, self._requests(asked, max_new_tokens), names, max_new_tokens)
        return answered(self.loaded, asked, 0, answers, texts)

    def check(self, sites: Sequence[ResolvedSite]) -> None:
        """See `Backend`."""
        check_sites(sites)

    def prove(self, batch: Batch, sites: Sequence[ResolvedSite]) -> Proof:
        """See `Backend`."""
        return self._prover.prove(batch, sites)

    def watch(self, plan: Plan, halves: dict[str, dict[str, Any]], probe: float = 0.0) -> None:
        """Have the workers keep what a plan names, if they do not already."""
        wanted = (plan, halves, probe)
        if self._watching != wanted:
            self._watching = None
            self.engine.call("mechanistic_watch", plan.to_dict(), halves, probe, self.engine.folder.name)
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
        labels = [
            {
                "text": asked.table(self.loaded, row, row, (), texts),
                "vision": encoder_table(row, asked.layouts[row]),
            }
            for row in range(len(samples))
        ]
        requests = self._requests(asked, max_new_tokens)
        for row, request in enumerate(requests):
            single = Single(samples[row].sample_id, request.tokens, request.images, labels[row])
            with naming(row):
                self._prover.check(single, proof, attended(sites))
        known = {name: vars(each) for name, each in proof.halves.items() if each is not None}
        self.watch(plan, known)
        names = self.engine.names(len(samples))
        expected = {name: request_of(row, labels[row], plan) for row, name in enumerate(names)}
        self.engine.call("mechanistic_begin", expected)
        answers = self._answers(asked, requests, names, max_new_tokens)
        spool, told = self.written()
        batch = answered(self.loaded, asked, 0, answers, texts)
        with spool:
            arrays = self._arrays(spool, plan, sites, batch)
            arrays |= self._attention_rows(spool, sites, batch, proof, told["encoder"])
            return Captured(batch, arrays, spool.logits(len(samples)))

    def _arrays(self, spool: Spool, plan: Plan, sites: Sequence[ResolvedSite], batch: Batch) -> Arrays:
        arrays: Arrays = {}
        for site in sites:
            if site.spec.site in ROW_SITES:
                continue
            name = f"{site.stack.name}/{site.spec.site}"
            tables = batch.table(site.spec.table)
            wanted = [np.flatnonzero(select(columns, site.spec.tokens)) for columns in tables]
            shape = (len(site.layers), sum(map(len, wanted)), *site.row_shape)
            whole = spool.whole(name, site.layers, plan.selection(name), wanted) if shape[1] else None
            if whole is not None and whole.shape == shape and is_stored_as(whole, site):
                arrays[site.group] = {site.name: whole.numpy()}
                continue
            values = np.empty(shape, site.dtype)
            arrays[site.group] = {site.name: values}
            # Of samples without images there is nothing of the encoder, not even an empty tensor.
            for place, layer in enumerate(site.layers if values.shape[1] else ()):
                heads, target = heads_of(site, site.spec.site), torch.from_numpy(values[place])
                rows = spool.rows(name, layer, plan.selection(name), wanted, heads, target)
                if site.heads is not None and len(site.heads) != heads:
                    rows = rows[:, list(site.heads)]
                stored = in_stored_dtype(rows, site, layer)
                if stored.data_ptr() != target.data_ptr():
                    target.copy_(stored)
        return arrays

    def _attention_rows(
        self,
        spool: Spool,
        sites: Sequence[ResolvedSite],
        batch: Batch,
        proof: Proof,
        told: Mapping[str, Mapping[str, Any]],
    ) -> Arrays:
        """The sites that are made of whole attention rows, rebuilt layer by layer."""
        row_sites = RowSites(sites, batch)
        lengths = [len(layout) for layout in batch.sequences]
        for stack in {each.site.stack.name: each.site.stack for each in row_sites.sites}.values():
            mine = [each.site for each in row_sites.sites if each.site.stack is stack]
            for layer in sorted({layer for site in mine for layer in site.layers}):
                rule = proof.rules[stack.name][layer]
                if stack.name == "text":
                    call = engine_call(spool, stack, self.engine.layers[layer], lengths, whole=False)
                    row_sites.take("text", layer, masked(call, rule, batch.sequences), rule)
                elif any(batch.images):
                    for call in encoder_calls(
                        spool, stack, layer, told[str(layer)], rule, batch.encoder, whole=False
                    ):
                        row_sites.take(stack.name, layer, call, rule)
        return row_sites.finish()

    def _requests(self, asked: Asked, limit: int) -> list[Request]:
        requests = []
        for row, prompt in enumerate(asked.prompts):
            length = int(asked.encoded.lengths[row])
            with naming(row):
                self._check_length(asked.samples[row], length + limit + 1)
            pixels = [image.pixels for image in asked.images[row]]
            # Without an image the engine has nothing to put into a prompt.
            tokens = self.tokens(prompt.text) if pixels else asked.encoded.ids(row).tolist()
            requests.append(Request(tokens, pixels))
        return requests

    def _answers(
        self, asked: Asked, requests: Sequence[Request], names: Sequence[str], limit: int
    ) -> list[list[int]]:
        """Run the engine on prompts; answers without the end token and what comes after it."""
        done = self.engine.run(names, requests, sampling(self.loaded, limit))
        ends = end_ids(self.loaded.model, self.loaded.tokenizer)
        for row, answer in enumerate(done):
            with naming(row):
                check_prompt(asked.samples[row].sample_id, answer, asked.encoded.ids(row).tolist())
        return [until(answer.tokens, ends)[:limit] for answer in done]

    def _check_length(self, sample: Sample, length: int) -> None:
        if length > self.engine.max_length:
            raise CaptureError(
                f"Sample {sample.sample_id!r}: prompt and answer may take {length} tokens, the engine takes "
                f"{self.engine.max_length}.",
                "Start it with --engine-option max_model_len=N, or leave the sample out.",
            )

    def tokens(self, text: str) -> list[int]:
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
