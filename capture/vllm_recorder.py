"""Keeps the wanted rows of an engine's tensors, step by step, until they are written to a file.

Runs inside a worker process of vLLM. What comes in is JSON-like, what goes out is a file: tensors over the
engine's own messages would arrive as lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .vllm_encoder import encoded_images
from .vllm_plan import stack_of, tensor_name
from .vllm_rows import Span, Wanted, check_spans, own_id, rows_wanted, spans_of_images, spans_of_step
from .vllm_stream import Stream

# Row of a batch, and the logits at its last prompt token.
LOGITS = "logits"
LOGITS_ROWS = "logits_rows"


class Recorder:
    """What one worker keeps of one batch.

    `plan` names layers and tokens by tensor: {"text/q": {"layers": [0], "selection": "text/all"}}.
    """

    def __init__(self, plan: Mapping[str, Mapping[str, Any]]) -> None:
        self.selection = {name: str(each["selection"]) for name, each in plan.items()}
        self.expected = {(name, int(layer)) for name, each in plan.items() for layer in each["layers"]}
        self.wanted: dict[str, dict[str, Wanted]] = {}
        self.numbers: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.images: dict[str, list[int]] = {}
        self.steps = 0
        self._scheduled: Any = None
        self._runner: Any = None
        self._spans: dict[str, list[Span]] = {}
        self._rows: dict[str, Tensor] = {}
        # Rows that came out of each tensor in this step.
        self._seen: dict[tuple[str, int], int] = {}
        self.begin({})

    def begin(self, requests: Mapping[str, Mapping[str, Any]]) -> None:
        """Forget everything and expect these requests, described as by `vllm_prover.request_of`, by id."""
        self.numbers = {name: int(each["number"]) for name, each in requests.items()}
        self.lengths = {name: int(each["prompt_length"]) for name, each in requests.items()}
        self.images = {name: [int(count) for count in each["images"]] for name, each in requests.items()}
        self.wanted = {}
        for name, each in requests.items():
            for selection, plain in each["wanted"].items():
                self.wanted.setdefault(selection, {})[name] = Wanted.parse(plain)
        self._kept: dict[tuple[str, int], list[Tensor]] = {key: [] for key in self.expected}
        self._labels: dict[str, list[Any]] = {selection: [] for selection in set(self.selection.values())}
        self._logits: dict[int, Tensor] = {}

    def enter(self, runner: Any, scheduled: Any) -> None:
        """A step begins."""
        self._runner, self._scheduled = runner, scheduled
        self._spans.clear()
        self._rows.clear()
        self._seen.clear()

    def leave(self) -> None:
        """A step ended well. CaptureError if a tensor that is wanted of it was not seen."""
        counts = {
            "text": self._scheduled.total_num_scheduled_tokens,
            "vision": sum(map(len, self._scheduled.scheduled_encoder_inputs.values())),
        }
        expected = {each for each in self.expected if counts[stack_of(each[0])]}
        missing = sorted(expected - set(self._seen))
        if missing:
            name, layer = missing[0]
            raise CaptureError(
                f"{tensor_name(name, layer)} was not seen in a step of the engine ({len(missing)} missing).",
                "The engine skips layers or replays compiled code; it needs enforce_eager=True.",
            )
        for (name, layer), rows in self._seen.items():
            # The decoder pads its steps; an encoder that did would put its padding among the patches.
            if stack_of(name) == "vision" and rows != self.spans("vision")[-1].stop:
                raise CaptureError(
                    f"{tensor_name(name, layer)}: the images of a step should be "
                    f"{self.spans('vision')[-1].stop} tokens, and are {rows}.",
                    "Padding would pass for patches: capture vision sites with --backend transformers.",
                )
        self.steps += 1
        self.abandon()

    def abandon(self) -> None:
        """No step is running: forwards from now on are the engine's own tests of itself."""
        self._scheduled = self._runner = None

    @property
    def active(self) -> bool:
        """Whether a step with scheduled tokens is running."""
        return self._scheduled is not None

    def put(self, name: str, layer: int, stream: Stream, shape: Sequence[int] = ()) -> None:
        """Keep the wanted rows of one tensor, or of the sum of two, as (row, *shape).

        An encoder may give the images of a step in pieces, one behind the other.
        """
        if not self.active or (name, layer) not in self.expected:
            return
        seen, stack = self._seen.get((name, layer), 0), stack_of(name)
        if seen and stack == "text":
            raise CaptureError(
                f"{tensor_name(name, layer)} came out of one step twice.",
                "This architecture needs an adapter; until it has one, leave this site out.",
            )
        rows = self._step_rows(stack, self.selection[name], stream[0].device)
        flat = [part.detach().reshape(-1, *(shape or part.shape[-1:])) for part in stream]
        self._seen[name, layer] = seen + len(flat[0])
        if stack == "vision":
            rows = rows[(rows >= seen) & (rows < seen + len(flat[0]))] - seen
        # Rows are in order: as many as there are, are all of them.
        every = len(rows) == len(flat[0])
        parts = flat if every else [part.index_select(0, rows) for part in flat]
        # A copy either way: the next fused kernel may write where the tensor is.
        kept = parts[0] + parts[1] if len(parts) == 2 else parts[0].clone() if every else parts[0]
        self._kept[name, layer].append(kept.cpu())

    def put_logits(self, logits: Tensor | None) -> None:
        """Keep the logits of requests whose prompt this step completes; `logits` has a row a request."""
        if not self.active or logits is None:
            return
        spans = self.spans("text")
        if logits.shape[0] != len(spans):
            raise CaptureError(
                f"A step of {len(spans)} requests has logits for {logits.shape[0]}.",
                "Speculative decoding cannot be captured; switch it off.",
            )
        for row, span in enumerate(spans):
            name = own_id(span.request)
            if name in self.numbers and span.positions.stop == self.lengths[name]:
                self._logits[self.numbers[name]] = logits[row].detach().float().cpu()

    def spans(self, stack: str) -> list[Span]:
        """Who the rows of this step are, checked once a step against the engine's own idea of them."""
        if stack not in self._spans:
            batch = self._runner.input_batch
            if stack == "text":
                spans = spans_of_step(list(batch.req_ids[: batch.num_reqs]), self._scheduled)
                _check_metadata(spans)
            else:
                spans = spans_of_images(encoded_images(self._runner, self._scheduled), self.images)
            self._spans[stack] = spans
        return self._spans[stack]

    def _step_rows(self, stack: str, selection: str, device: torch.device) -> Tensor:
        if selection not in self._rows:
            rows, labels = rows_wanted(self.spans(stack), self.wanted.get(selection, {}), self.numbers)
            self._labels[selection].append(labels)
            self._rows[selection] = torch.from_numpy(rows).to(device)
        return self._rows[selection]

    def write(self, stem: Path, extra: Mapping[str, Tensor]) -> None:
        """Write everything that was kept, and forget it.

        A file of bare numbers a tensor, layer by layer, which can be mapped as (layer, row, ...); and one of
        what is small, whose metadata say what the others hold.
        """
        from safetensors.torch import save_file

        small = dict(extra)
        held: dict[str, dict[str, Any]] = {}
        for name in self.selection:
            layers = sorted(layer for tensor, layer in self.expected if tensor == name)
            parts = [self._kept[name, layer] for layer in layers]
            if not parts[0]:
                continue
            rows, (first, *_) = sum(map(len, parts[0])), parts[0]
            dtype = str(first.dtype).removeprefix("torch.")
            held[name] = {"layers": layers, "dtype": dtype, "shape": [len(layers), rows, *first.shape[1:]]}
            path = numbers_file(stem, name)
            # Over what an earlier batch left: what is behind the end of these numbers nobody reads.
            with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
                for part in (part for each in parts for part in each):
                    left = part.contiguous().view(torch.uint8).numpy().reshape(-1).data
                    while left:
                        left = left[file.write(left) :]
        for selection, labels in self._labels.items():
            joined = np.concatenate([np.zeros((0, 2), np.int64), *labels])
            small[f"rows.{selection}"] = torch.from_numpy(joined)
        if self._logits:
            small[LOGITS] = torch.stack(list(self._logits.values()))
            small[LOGITS_ROWS] = torch.tensor(list(self._logits))
        tensors = {name: each.contiguous() for name, each in small.items()}
        save_file(tensors, stem.with_suffix(".safetensors"), {"held": json.dumps(held)})
        self.begin({})


def numbers_file(stem: Path, tensor: str) -> Path:
    """The file of one tensor's numbers."""
    return stem.with_name(f"{stem.name}.{tensor.replace('/', '.')}")


def _check_metadata(spans: Sequence[Span]) -> None:
    """Compare with every attention kernel's own idea of the step."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        raise CaptureError(
            "The engine cuts its steps into micro-batches, whose rows cannot be told apart.",
            "Switch dual batch overlap off.",
        )
    kernels = {id(each): each for each in metadata.values() if hasattr(each, "query_start_loc")}
    if not kernels:
        raise CaptureError(
            "The attention kernels of this engine do not say where their requests begin.",
            "Use another attention backend of vLLM, or the transformers backend.",
        )
    for kernel in kernels.values():
        starts = kernel.query_start_loc[: len(spans) + 1].tolist()
        check_spans(spans, starts, kernel.seq_lens[: len(spans)].tolist())
