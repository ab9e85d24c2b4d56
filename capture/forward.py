"""The captured forward: every wanted tensor, cut to the wanted rows, as labelled arrays on the host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import CaptureError

from .anatomy import CROSS
from .answers import to_device
from .batch import Batch
from .encoder_masks import EncoderMasks
from .host_copies import HostCopies
from .mask_rules import MaskRule, SequenceLayout, check_cross_rule, check_rule
from .models import LoadedModel
from .residual import Halves, residual_hooks
from .room import Memory, Room, seen_as
from .row_sites import RowSites
from .sites import ResolvedSite, attended
from .specification import RESIDUAL_SITES, ROW_SITES
from .tables import Rows
from .tap import AttentionCall, tapped
from .token_table import joined, select

Array = NDArray[Any]
# Of a decoder, (row of the tensor's batch axis, position on its token axis) of each wanted token; of an
# encoder, the rows among all its tokens in the order of its forward.
Where = tuple[Tensor, ...]
# Tokens of one sample that stand in a row: row of the batch, position, first row in the run, how many.
Stretch = tuple[int, int, int, int]
# Stretches shorter than this on average are gathered as single rows.
LONG_STRETCH = 16


class Collector:
    """Takes tensors as they come out of a forward and keeps the wanted rows of the wanted layers."""

    def __init__(self, sites: Sequence[ResolvedSite], batch: Batch, device: torch.device, room: Room) -> None:
        self.sites = {(site.stack.name, site.spec.site): [] for site in sites}  # type: dict[tuple[str, str], list[ResolvedSite]]
        self.where: dict[str, Where] = {}
        self._room = room
        self._memory: dict[tuple[str, int], Memory | None] = {}
        self._stretches: dict[str, list[Stretch] | None] = {}
        self._copies = HostCopies()
        self._missing: set[tuple[str, int]] = set()
        self._encoder_rows = sum(len(columns["position"]) for columns in batch.encoder)
        self._encoder_seen: dict[tuple[str, int], int] = {}
        for site in sites:
            self.sites[site.stack.name, site.spec.site].append(site)
            where = rows_of(site, batch)
            self.where[site.group] = tuple(index.to(device) for index in where)
            self._stretches[site.group] = stretches(where) if device.type == "cpu" else None
            self._memory |= {(site.group, layer): None for layer in site.layers}
            # Samples without images have no encoder forward.
            self._missing |= {(site.group, layer) for layer in site.layers if len(where[0])}

    def take(self, stack: str, layer: int, name: str, tensor: Tensor) -> None:
        """Keep what is wanted of one tensor (batch, token, ...); an encoder may give its tokens in pieces."""
        for site in self.sites.get((stack, name), ()):
            # A batch may hold none of the tokens, such as options that no question names.
            if layer not in site.layers or not len(self.where[site.group][0]):
                continue
            if (site.group, layer) not in self._missing:
                raise CaptureError(
                    f"{stack}.{layer}.{name} came out of one forward twice.",
                    "This architecture needs an adapter; until it has one, leave this site out.",
                )
            if site.stack.is_encoder:
                self._take_piece(site, layer, tensor.reshape(-1, *tensor.shape[-len(site.row_shape) :]))
                continue
            self._take_rows(site, layer, tensor)
            self._missing.remove((site.group, layer))

    def _take_rows(self, site: ResolvedSite, layer: int, tensor: Tensor) -> None:
        whole = self._stretches[site.group]
        if whole is None or tensor.device.type != "cpu":
            batch, position = (index.to(tensor.device) for index in self.where[site.group])
            self._put(site, layer, slice(None), tensor[batch, position])
            return
        for sample, first, row, count in whole:
            self._put(site, layer, slice(row, row + count), tensor[sample, first : first + count])

    def _take_piece(self, site: ResolvedSite, layer: int, rows: Tensor) -> None:
        key = (site.group, layer)
        start = self._encoder_seen.get(key, 0)
        end = self._encoder_seen[key] = start + len(rows)
        (wanted,) = self.where[site.group]
        first, last = torch.searchsorted(wanted, torch.tensor([start, end], device=wanted.device)).tolist()
        self._put(site, layer, slice(first, last), rows[(wanted[first:last] - start).to(rows.device)])
        if end >= self._encoder_rows:
            self._missing.remove(key)

    def _put(self, site: ResolvedSite, layer: int, where: slice, rows: Tensor) -> None:
        if site.heads is not None and len(site.heads) != rows.shape[1]:
            rows = rows[:, list(site.heads)]
        self._copies.put(in_stored_dtype(rows, site, layer), self._rows(site, layer)[where])

    def _rows(self, site: ResolvedSite, layer: int) -> Array:
        """In memory taken when the layer comes by: by then the batch before may be written, and its free."""
        memory = self._memory[site.group, layer]
        if memory is None:
            memory = self._memory[site.group, layer] = self._room.take(*self._form(site))
        return seen_as(memory, *self._form(site))

    def _form(self, site: ResolvedSite) -> tuple[tuple[int, ...], str]:
        return (len(self.where[site.group][0]), *site.row_shape), site.dtype

    def finish(self) -> Rows:
        """The rows of every layer, by group and name. CaptureError unless every wanted layer was seen."""
        if self._missing:
            group, layer = sorted(self._missing)[0]
            raise CaptureError(
                f"{group}: layer {layer} was not seen in the forward ({len(self._missing)} missing in all).",
                "The model skips layers or attends by code of its own; leave this site out.",
            )
        self._copies.finish()
        return {
            site.group: {site.name: self._layers(site)} for group in self.sites.values() for site in group
        }

    def _layers(self, site: ResolvedSite) -> list[Array]:
        form = self._form(site)
        return [self._room.lend(self._memory[site.group, layer], *form) for layer in site.layers]


def rows_of(site: ResolvedSite, batch: Batch) -> Where:
    """Where the wanted tokens of a site are in the tensors of this batch, in the order of the run."""
    wanted = [select(columns, site.spec.tokens) for columns in batch.table(site.spec.table)]
    if site.stack.is_encoder:
        return (torch.from_numpy(np.flatnonzero(np.concatenate(wanted))),)
    position = [np.flatnonzero(each) for each in wanted]
    sample = np.repeat(np.arange(len(position)), [len(rows) for rows in position])
    return torch.from_numpy(sample), torch.from_numpy(np.concatenate(position))


def stretches(where: Where) -> list[Stretch] | None:
    """The wanted tokens as unbroken stretches, each copied once and not twice; None if they are short."""
    if len(where) != 2 or not len(where[0]):
        return None
    batch, position = (index.numpy() for index in where)
    starts = np.flatnonzero((np.diff(batch, prepend=-1) != 0) | (np.diff(position, prepend=-2) != 1))
    counts = np.diff(starts, append=len(batch))
    if len(batch) < LONG_STRETCH * len(starts):
        return None
    columns = (batch[starts], position[starts], starts, counts)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(*columns, strict=True)]


def to_host(rows: Tensor, site: ResolvedSite, layer: int) -> Array:
    """Copy to numpy in the stored dtype. Raises like `in_stored_dtype`."""
    return in_stored_dtype(rows, site, layer).cpu().numpy()


def in_stored_dtype(rows: Tensor, site: ResolvedSite, layer: int) -> Tensor:
    """The rows in the dtype that the run keeps.

    CaptureError for a cast that was not asked for, or that would make a finite value infinite.
    """
    if site.spec.dtype is None and rows.dtype != getattr(torch, site.source_dtype):
        raise CaptureError(
            f"{site.stack.name}.{layer}.{site.spec.site} is {rows.dtype}, the model {site.source_dtype}.",
            f"Say how to store it: {site.spec.to_string()}:float32.",
        )
    stored = rows.to(getattr(torch, site.dtype))
    cast = site.dtype == "float16" and rows.dtype != torch.float16
    if cast and not bool(torch.isfinite(stored).all()):
        raise CaptureError(
            f"{site.stack.name}.{layer}.{site.spec.site} has values up to {float(rows.abs().max()):.3g}, "
            "which float16 cannot hold.",
            f"Store this site as float32: {site.spec.to_string().removesuffix(':float16')}:float32.",
        )
    return stored


def capture_forward(
    loaded: LoadedModel,
    batch: Batch,
    sites: Sequence[ResolvedSite],
    halves: Mapping[str, Halves | None],
    rules: Mapping[str, Mapping[int, MaskRule]],
    room: Room,
) -> tuple[Rows, NDArray[np.float32] | None]:
    """One forward over prompt and answer, what is kept of it in `room`.

    Returns the arrays of every site by group and name, of each layer (row, ...), and the logits at each
    sample's last prompt token, (sample, vocabulary), where the model has any.

    Raises
    ------
    CaptureError    a layer was not seen, a mask is not what was proven, or a cast would overflow.
    """
    whole = [site for site in sites if site.spec.site not in ROW_SITES]
    collector, row_sites = Collector(whole, batch, loaded.model.device, room), RowSites(sites, batch)
    names = attended(sites)
    with ExitStack() as active:
        if names:
            layers = loaded.anatomy.module_layers(names)
            watch = AttentionWatch(collector, row_sites, layers, rules, batch)
            active.enter_context(tapped(loaded.model, watch))
        for stack in loaded.anatomy.stacks.values():
            wanted = {
                name: sorted({layer for site in group for layer in site.layers})
                for (owner, name), group in collector.sites.items()
                if owner == stack.name and name in RESIDUAL_SITES
            }
            hooks = residual_hooks(stack, wanted, halves.get(stack.name), collector.take)
            active.enter_context(hooks)
        logits = last_prompt_logits(loaded.model, batch)
    return {**collector.finish(), **row_sites.finish()}, logits


class AttentionWatch:
    """Checks the mask of each attention call against its layer's rule, and hands its parts on."""

    def __init__(
        self,
        collector: Collector,
        row_sites: RowSites,
        layers: Mapping[nn.Module, tuple[str, int]],
        rules: Mapping[str, Mapping[int, MaskRule]],
        batch: Batch,
    ) -> None:
        self.collector = collector
        self.row_sites = row_sites
        self.layers = layers
        self.rules = rules
        self.encoder = EncoderMasks(batch.encoder)
        self.batch = batch
        self._sequences: dict[str, list[SequenceLayout]] = {}
        self._checked: list[tuple[Tensor | None, MaskRule]] = []

    def __call__(self, call: AttentionCall) -> None:
        if call.module not in self.layers:
            return
        name, layer = self.layers[call.module]
        self._check(call, name, layer)
        stack, cross = name.removesuffix(CROSS), "x" if name.endswith(CROSS) else ""
        # Each part as (batch, token, head, d_head).
        self.collector.take(stack, layer, f"{cross}q", call.query.transpose(1, 2))
        self.collector.take(stack, layer, f"{cross}k", call.key.transpose(1, 2))
        self.collector.take(stack, layer, f"{cross}v", call.value.transpose(1, 2))
        self.collector.take(stack, layer, f"{cross}z", call.output)
        self.row_sites.take(name, layer, call, self.rules[name][layer])

    def _check(self, call: AttentionCall, stack: str, layer: int) -> None:
        rule = self.rules[stack][layer]
        if stack.startswith("vision"):
            self.encoder.check(rule, call, layer, stack)
            return
        # Layers share mask tensors: each is compared with a rule once.
        if any(mask is call.mask and known == rule for mask, known in self._checked):
            return
        if stack.endswith(CROSS):
            check_cross_rule(rule, call, self.batch.table("xq"), self.batch.table("xk"), f"{stack}.{layer}")
        else:
            check_rule(rule, call, self._layouts(stack), f"{stack}.{layer}")
        self._checked.append((call.mask, rule))

    def _layouts(self, stack: str) -> list[SequenceLayout]:
        if stack not in self._sequences:
            self._sequences[stack] = self.batch.layouts(stack)
        return self._sequences[stack]


def last_prompt_logits(model: Any, batch: Batch) -> NDArray[np.float32] | None:
    """Run the forward; logits of the last prompt token of each sample, None for a model without any."""
    output, rows = run_forward(model, batch)
    logits: Tensor | None = getattr(output, "logits", None)
    # Of an image classifier they are not words.
    if logits is None or "input_ids" not in batch.inputs:
        return None
    places = torch.from_numpy(rows).to(logits.device)
    chosen = logits[torch.arange(len(places), device=logits.device), places]
    result: NDArray[np.float32] = chosen.float().cpu().numpy()
    return result


def run_forward(model: Any, batch: Batch) -> tuple[Any, NDArray[np.int64]]:
    """What the model returns, and where in its logits the last prompt token of each sample is."""
    wanted, row_in_kept = np.unique(batch.last_prompt, return_inverse=True)
    arguments: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    keep = takes(model, "logits_to_keep")
    if keep:
        # Logits of the whole vocabulary for every token would be the largest tensor by far.
        arguments["logits_to_keep"] = torch.from_numpy(wanted).to(model.device)
    with torch.no_grad():
        output = model(**to_device(batch.inputs, model), **arguments)
    return output, row_in_kept if keep else batch.last_prompt


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def site_rows(site: ResolvedSite, batch: Batch) -> dict[str, Array]:
    """The labels of a site's rows, in the same order as its array's."""
    if site.axis == "sample":
        return {}
    whole = joined(batch.table(site.spec.table))
    kept = select(whole, site.spec.tokens)
    return {name: values[kept] for name, values in whole.items()}
