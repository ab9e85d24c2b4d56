"""A cache becomes a run: what interactive hooks kept, in the format that every analysis reads.

There is no dataset behind it: each row of each forward is a sample without a question, and tokens have ids
and kinds only as far as the forward was given them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store import RunWriter
from mechanistic.store.errors import SpecificationError, UsageError
from mechanistic.store.schema import KIND, ArraySchema, GroupSchema, sample_columns, token_columns

from .anatomy import Anatomy, find_anatomy
from .attended import Attended
from .batch_rows import place_rows
from .forward_cache import as_array
from .hooks import ForwardInputs
from .prompts import tokenizer_of
from .run_description import software
from .sites import ResolvedSite, stored_dtype
from .specification import SiteSpec
from .token_table import TokenTexts

Array = NDArray[Any]
Rows = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class SequenceInForward:
    """One row of one forward: its places in the padded tensors, and its token ids (-1 where unknown)."""

    forward: int
    row: int
    places: Tensor
    token_ids: Array


def write_residuals(
    path: Path,
    model: nn.Module,
    kept: Mapping[str, Sequence[Tensor]],
    inputs: Sequence[ForwardInputs],
    processor: Any,
) -> Path:
    """Write outputs of whole layers as resid_post; see `ActivationCache.to_run`."""
    anatomy = find_anatomy(model)
    layers = {
        module: (name, n) for name, stack in anatomy.stacks.items() for n, module in enumerate(stack.layers)
    }
    placed = _placed(model, kept, layers, "resid_post")

    def values(stack: str, forward: int) -> Callable[[SequenceInForward], Rows]:
        tensors = [placed[stack][layer][forward] for layer in sorted(placed[stack])]
        return lambda each: {
            f"{stack}/resid_post": {
                "resid_post": np.stack([as_array(one[each.row][each.places]) for one in tensors])
            }
        }

    shapes = {stack: [tensor.shape[:2] for tensor in runs[min(runs)]] for stack, runs in placed.items()}
    dtype = str(next(iter(next(iter(placed.values())).values()))[0].dtype).removeprefix("torch.")
    run = _CacheRun(anatomy, "resid_post", placed, shapes, inputs, dtype)
    return run.write(path, model, values, processor)


def write_patterns(
    path: Path,
    model: nn.Module,
    kept: Mapping[str, Sequence[Attended]],
    inputs: Sequence[ForwardInputs],
    processor: Any,
) -> Path:
    """Write attention weights as patterns; see `AttentionCache.to_run`."""
    anatomy = find_anatomy(model)
    placed = _placed(model, kept, anatomy.module_layers(anatomy.stacks), "pattern")

    def values(stack: str, forward: int) -> Callable[[SequenceInForward], Rows]:
        patterns = [placed[stack][layer][forward].pattern() for layer in sorted(placed[stack])]
        return lambda each: _pattern_rows(stack, patterns, each)

    shapes: dict[str, list[Any]] = {}
    for stack, runs in placed.items():
        patterns = [run.pattern().shape for run in runs[min(runs)]]
        shapes[stack] = [(shape[0], shape[2]) for shape in patterns]
        if any(shape[2] != shape[3] for shape in patterns):
            raise UsageError(
                f"A forward of {stack} has {patterns[-1][2]} queries and {patterns[-1][3]} keys.",
                "Clear the cache and run whole prompts, with use_cache=False, instead of generate.",
            )
    source = next(iter(next(iter(placed.values())).values()))[0].source_dtype
    return _CacheRun(anatomy, "pattern", placed, shapes, inputs, source).write(path, model, values, processor)


def _placed(
    model: nn.Module,
    kept: Mapping[str, Sequence[Any]],
    layers: Mapping[nn.Module, tuple[str, int]],
    site: str,
) -> dict[str, dict[int, Sequence[Any]]]:
    """What was kept, by stack and layer."""
    placed: dict[str, dict[int, Sequence[Any]]] = {}
    for name, runs in kept.items():
        module = model.get_submodule(name)
        if module not in layers:
            raise SpecificationError(
                f"'{name}' is not what a run calls {site} of a layer of the decoder or the encoder.",
                "Register layers of those only (layer_names=...), then run the model again.",
            )
        if runs:
            stack, layer = layers[module]
            placed.setdefault(stack, {})[layer] = runs
    if not placed:
        raise UsageError("This cache is empty.", "Run the model while its hooks are on.")
    for stack, by_layer in placed.items():
        if len({len(runs) for runs in by_layer.values()}) > 1:
            raise UsageError(
                f"Some layers of {stack} have run more often than others since they were registered.",
                "Clear the cache and run the model again.",
            )
    return placed


class _CacheRun:
    """The samples of a cache, and the groups of the run that it becomes."""

    def __init__(
        self,
        anatomy: Anatomy,
        site: str,
        placed: Mapping[str, Mapping[int, Sequence[Any]]],
        shapes: Mapping[str, Sequence[tuple[int, int]]],
        inputs: Sequence[ForwardInputs],
        dtype: str,
    ) -> None:
        self.anatomy = anatomy
        self.shapes = shapes
        self.stacks = list(placed)
        self.sites = [_resolved(anatomy, stack, site, sorted(placed[stack]), dtype) for stack in placed]
        leading = "text" if "text" in placed else self.stacks[0]
        forwards = len(shapes[leading])
        for stack in self.stacks:
            if [shape[0] for shape in shapes[stack]] != [shape[0] for shape in shapes[leading]]:
                raise UsageError(
                    f"Forwards of {stack} and of {leading} have different numbers of rows.",
                    f"Register layers of one of them only, and give each prompt one image to keep {stack}.",
                )
        if leading == "text" and len(inputs) != forwards:
            inputs = [ForwardInputs(None, None)] * forwards
        self.samples = [
            _sequence(forward, row, shapes[leading][forward], inputs[forward] if leading == "text" else None)
            for forward in range(forwards)
            for row in range(shapes[leading][forward][0])
        ]

    def write(
        self,
        path: Path,
        model: nn.Module,
        values: Callable[[str, int], Callable[[SequenceInForward], Rows]],
        processor: Any,
    ) -> Path:
        """Write one sample after the other."""
        texts = TokenTexts(tokenizer_of(processor)) if processor is not None else {}
        groups = [GroupSchema("samples", "sample", sample_columns(1))]
        groups += [
            GroupSchema(f"tokens/{stack}", _axis(stack), token_columns(_axis(stack)), {"stack": stack})  # type: ignore[arg-type]
            for stack in self.stacks
        ]
        groups += [schema for site in self.sites for schema in site.schemas({})]
        ready = -1
        of_stack: dict[str, Callable[[SequenceInForward], Rows]] = {}
        with RunWriter.create(path, self._attributes(model), groups, samples=len(self.samples)) as writer:
            for sample in self.samples:
                if sample.forward != ready:
                    of_stack = {stack: values(stack, sample.forward) for stack in self.stacks}
                    ready = sample.forward
                rows: Rows = {"samples": _sample(f"forward {sample.forward}, row {sample.row}")}
                for stack, site in zip(self.stacks, self.sites, strict=True):
                    mine = sample
                    if stack == "vision" and "text" in self.stacks:
                        mine = _sequence(sample.forward, sample.row, self.shapes[stack][sample.forward], None)
                    table = _table(stack, mine, self.anatomy.image_token_id, texts)
                    rows[f"tokens/{stack}"] = table
                    rows |= of_stack[stack](mine)
                    rows[site.label_group] = {**rows.get(site.label_group, {}), **table}
                before = {group.path: writer.rows(group.path) for group in groups}
                writer.append(place_rows(rows, before, groups), samples=1)
            writer.finish()
        return path

    def _attributes(self, model: nn.Module) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(each.token_ids.tobytes() for each in self.samples)).hexdigest()
        dtype = self.sites[0].source_dtype
        return {
            "model": {"name": type(model).__name__, "dtype": dtype, "backend": "transformers"},
            "dataset": {"name": "cache", "hash": digest, "num_samples": len(self.samples)},
            "capture": {"sites": [site.spec.to_string() for site in self.sites], "from": "cache"},
            "software": software(),
        }


def _resolved(anatomy: Anatomy, stack: str, site: str, layers: list[int], dtype: str) -> ResolvedSite:
    spec = SiteSpec.parse(f"{stack}.{'+'.join(map(str, layers))}.{site}")
    found = anatomy.stack(stack)
    heads = tuple(range(found.heads)) if site == "pattern" else None
    kept = "float32" if site == "pattern" else stored_dtype(dtype)
    return ResolvedSite(spec, found, tuple(layers), heads, kept, dtype)


def _axis(stack: str) -> str:
    return "patch" if stack == "vision" else "token"


def _sequence(
    forward: int, row: int, shape: tuple[int, int], inputs: ForwardInputs | None
) -> SequenceInForward:
    """A row without its padding, as far as an attention mask says what that is."""
    places, ids = torch.arange(shape[1]), np.full(shape[1], -1, np.int32)
    mask = None if inputs is None else inputs.attention_mask
    if mask is not None and tuple(mask.shape) == tuple(shape):
        places = mask[row].bool().nonzero()[:, 0]
    given = None if inputs is None else inputs.token_ids
    if given is not None and tuple(given.shape) == tuple(shape):
        ids = given[row].numpy().astype(np.int32)
    return SequenceInForward(forward, row, places, ids[places.numpy()])


def _blank(schemas: Sequence[ArraySchema], axis: str, rows: int) -> dict[str, Array]:
    return {
        array.name: np.full(
            array.shape(axis, rows), array.fill_value, object if array.dtype == "string" else array.dtype
        )
        for array in schemas
    }


def _sample(name: str) -> dict[str, Array]:
    columns = _blank(sample_columns(1), "sample", 1)
    columns["sample_id"][:] = name
    columns["status"][:] = 0
    return columns


def _table(
    stack: str, sequence: SequenceInForward, image_token: int | None, texts: Mapping[int, str]
) -> dict[str, Array]:
    axis, count = _axis(stack), len(sequence.places)
    columns = _blank(token_columns(axis), axis, count)  # type: ignore[arg-type]
    columns["sample_index"][:] = 0
    columns["position"][:] = np.arange(count)
    if stack == "vision":
        columns["kind"][:] = KIND["image"]
        return columns
    columns["kind"][:] = KIND["text"]
    columns["kind"][sequence.token_ids == (-2 if image_token is None else image_token)] = KIND["image"]
    columns["token_id"][:] = sequence.token_ids
    if isinstance(texts, TokenTexts):
        columns["token_text"][:] = [texts[int(t)] if t >= 0 else "" for t in sequence.token_ids]
    return columns


def _pattern_rows(stack: str, patterns: Sequence[Tensor], each: SequenceInForward) -> Rows:
    count = len(each.places)
    weights = [
        pattern[each.row][:, each.places][:, :, each.places].permute(1, 2, 0).flatten(0, 1).numpy()
        for pattern in patterns
    ]
    places: dict[str, Array] = {
        "start": np.arange(count, dtype=np.int64) * count,
        "length": np.full(count, count, np.int64),
        "key_start": np.zeros(count, np.int32),
    }
    return {f"{stack}/pattern": {"pattern": np.stack(weights)}, f"{stack}/pattern_rows": places}
