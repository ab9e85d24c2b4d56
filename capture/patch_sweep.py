"""Patched forwards in batches: one site of one layer, many places, heads and pairs of samples at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import Batch
from .encoder_edits import OverCrops
from .interventions import Edit, ReplaceRows, intervening, replace_rows
from .known_images import KnownImages, given_images, known_images
from .known_states import KnownStates, Rows, StoredStates, Wanted
from .later_tokens import EarlierTokens, earlier_tokens, later_tokens
from .models import LoadedModel
from .patch_batches import patch_batches
from .pattern_rows import ReplacePattern, padded_keys
from .prompts import Inputs
from .residual import Halves
from .resumed_forward import ResumedForward, check_error, joined_inputs, plain_logits

# What a batch of forwards costs besides its tokens, in tokens: weights are read, and kernels started.
BATCH_COST = 64


@dataclass(frozen=True)
class Patch:
    """Which rows of sample `base` are replaced by which of `source`; of all heads, or of one.

    `base_rows` and `source_rows` are positions of the stack's own tokens, one to one.
    """

    base: int
    source: int
    base_rows: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    head: int | None = None


@dataclass(frozen=True)
class Resumption:
    """Where patched forwards start, from which streams (token, d_model) of each sample."""

    start: int
    site: str
    layer: int
    streams: Mapping[int, Tensor]

    @property
    def enters(self) -> bool:
        """Whether the patch is made in what enters the first layer, and not inside of it."""
        return self.site == "resid_pre" or self.start > self.layer

    @property
    def alone(self) -> int:
        """The first layer that may see later tokens alone: edits in a layer are made among all tokens."""
        return self.start if self.enters else self.layer + 1


@dataclass(frozen=True)
class PatchSweep:
    """Everything that patched forwards of one run or dataset share.

    `later`: how exact forwards of later tokens alone are, see `prove_later_tokens`; None, where a patched
    forward computes every token.
    """

    loaded: LoadedModel
    resumed: ResumedForward
    states: KnownStates
    questions: Mapping[int, Batch]
    halves: Mapping[str, Halves | None]
    batch_size: int
    later: float | None = None
    _earlier: dict[int, tuple[int, EarlierTokens]] = field(default_factory=dict)
    _images: dict[int, KnownImages] = field(default_factory=dict)

    def start(self, stack: str, site: str, layer: int) -> int | None:
        """The decoder's layer at which a patched forward starts; None where it is a whole one."""
        if stack != "text":
            return None
        after = site == "resid_post" and layer + 1 > self.resumed.image_layers
        return layer + 1 if after else layer

    def needed(self, stack: str, site: str, layer: int) -> list[Wanted]:
        """What must be known of samples: the stream that enters the forward, and what is patched."""
        start = self.start(stack, site, layer)
        own = [(stack, site, layer)]
        return own if start is None else [self._entering(start), *own]

    def require(self, stack: str, site: str, layer: int) -> None:
        """MissingSiteError unless the run has what a patch of this site needs, at least of some tokens."""
        if isinstance(self.states, StoredStates):
            for each in self.needed(stack, site, layer):
                self.states.find(*each)

    def prepare(self, samples: Iterable[int], patched: Iterable[Wanted]) -> None:
        """Make known what patches of these sites need of these samples."""
        self._earlier.clear()
        self._images.clear()
        self.states.prepare(samples, [each for site in patched for each in self.needed(*site)])

    @property
    def kept_layers(self) -> int:
        """How many layers of a sample are in memory at a time."""
        depth = len(self.loaded.anatomy.stack("text").layers)
        return 1 if isinstance(self.states, StoredStates) else depth

    @property
    def kept_keys(self) -> int:
        """How many bytes a token's keys and values take."""
        stack = self.loaded.anatomy.stack("text")
        width = 2 * len(stack.layers) * stack.kv_heads * stack.head_width
        return width * self.loaded.model.dtype.itemsize if self.later is not None else 0

    def logits(
        self, stack: str, site: str, layer: int, patches: Sequence[Patch], skip: int = 0
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Logits (patch, word), float32, batch by batch, each with the numbers of its patches.

        The first `skip` batches are left out.

        Raises
        ------
        MissingSiteError    the run lacks a row that is needed.
        """
        bases = sorted({patch.base for patch in patches})
        sources = self.states.rows(stack, site, layer, sorted({patch.source for patch in patches}))
        for patch in patches:
            self._require(sources[patch.source], patch.source_rows, stack, site, patch.source)
        start = self.start(stack, site, layer)
        resumption = None if start is None else Resumption(start, site, layer, self.streams(start, bases))
        begins = [0 if resumption is None else self._begin(resumption, patch) for patch in patches]
        tokens = [self.length(patch.base) - begin for patch, begin in zip(patches, begins, strict=True)]
        for where in patch_batches(tokens, self.batch_size, BATCH_COST)[skip:]:
            chosen = [patches[number] for number in where]
            found = [sources[each.source].at(each.source_rows, each.head) for each in chosen]
            values = padded_keys(found) if site == "pattern" else torch.cat(found)
            with torch.no_grad():
                if resumption is None:
                    yield where, self._whole(stack, site, layer, chosen, values)
                else:
                    yield where, self._resumed(resumption, chosen, values, [begins[each] for each in where])

    def prove_states(self, layers: Sequence[int], sample: int) -> float:
        """By how much logits from the known states of a sample miss those of a plain forward of it.

        Raises
        ------
        CaptureError    by more than the dtype explains.
        """
        inputs, last = joined_inputs(self.loaded, [self.questions[sample].inputs])
        with torch.no_grad():
            plain = plain_logits(self.loaded, inputs, last)
            error = 0.0
            for layer in layers:
                hidden = self.streams(layer, [sample])[sample][None]
                got = self.resumed.logits(inputs, last, layer, hidden)
                error = max(error, float((got - plain).abs().max() / plain.abs().max().clamp_min(1e-30)))
        check_error(error, self.loaded.dtype, "a forward resumed from the run's states")
        return error

    def _entering(self, start: int) -> tuple[str, str, int]:
        depth = len(self.loaded.anatomy.stack("text").layers)
        return ("text", "resid_pre", start) if start < depth else ("text", "resid_post", depth - 1)

    def streams(self, start: int, samples: Sequence[int]) -> dict[int, Tensor]:
        """What goes into a layer, (token, d_model), of whole prompts."""
        stack, site, layer = self._entering(start)
        found = {}
        for number, rows in self.states.rows(stack, site, layer, samples).items():
            every = np.arange(self.length(number))
            self._require(rows, every, stack, site, number)
            found[number] = rows.at(every)
        return found

    def length(self, sample: int) -> int:
        """How many tokens a sample's prompt has."""
        return int(self.questions[sample].inputs["input_ids"].shape[1])

    def _require(self, rows: Rows, positions: NDArray[np.int64], stack: str, site: str, sample: int) -> None:
        if rows.lacking(positions):
            assert isinstance(self.states, StoredStates)
            name = self.questions[sample].samples[0].sample_id
            gone = len(np.setdiff1d(positions, rows.positions))
            raise self.states.missing(stack, site, f"{gone} of {len(positions)} tokens of sample {name!r}")

    def _begin(self, resumption: Resumption, patch: Patch) -> int:
        """The first token that a patch may reach, where earlier ones can be left out."""
        if self.later is None or resumption.alone >= len(self.loaded.anatomy.stack("text").layers):
            return 0
        known = self._earlier.get(patch.base)
        start = resumption.start
        if known is None or known[0] > start:
            hidden = resumption.streams[patch.base][None]
            inputs, last = self._joined([patch.base], start)
            with self._images_of([patch.base], start):
                seen = earlier_tokens(self.loaded, lambda: self.resumed.logits(inputs, last, start, hidden))
            known = self._earlier[patch.base] = (start, seen)
        return known[1].reached(int(patch.base_rows.min()))

    def _joined(self, samples: Sequence[int], start: int) -> tuple[Inputs, Tensor]:
        inputs = [self.questions[number].inputs for number in samples]
        return joined_inputs(self.loaded, inputs, images=self.resumed.needs_images(start))

    def _images_of(self, samples: Sequence[int], start: int) -> AbstractContextManager[None]:
        """Forwards that need the images again take what the encoder gave for them once."""
        if not self.resumed.needs_images(start):
            return nullcontext()
        for number in set(samples) - self._images.keys():
            alone = self._joined([number], 0)
            self._images[number] = known_images(self.loaded, partial(plain_logits, self.loaded, *alone))
        return given_images(self.loaded, [self._images[number] for number in samples])

    def _resumed(
        self, resumption: Resumption, chosen: Sequence[Patch], values: Tensor, begins: Sequence[int]
    ) -> Tensor:
        bases = [patch.base for patch in chosen]
        start, site = resumption.start, resumption.site
        inputs, last = self._joined(bases, start)
        streams = [resumption.streams[number] for number in bases]
        hidden = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True).to(self.loaded.model.device)
        index = _index(chosen)
        with ExitStack() as active:
            active.enter_context(self._images_of(bases, start))
            if any(begins):
                earlier = [self._earlier[number][1] for number in bases]
                active.enter_context(later_tokens(self.loaded, resumption.alone, begins, last, earlier))
            if resumption.enters:
                return self.resumed.logits(inputs, last, start, replace_rows(hidden, index, values))
            change: Any = ReplaceRows(index, values)
            if site == "pattern":
                width = hidden.shape[1]
                change = _replaced_pattern(chosen, [place * width for place in range(len(chosen))], values)
            edit = Edit("text", resumption.layer, site, change)
            active.enter_context(intervening(self.loaded, [edit], self.halves))
            return self.resumed.logits(inputs, last, start, hidden)

    def _whole(self, stack: str, site: str, layer: int, chosen: Sequence[Patch], values: Tensor) -> Tensor:
        inputs, last = joined_inputs(self.loaded, [self.questions[patch.base].inputs for patch in chosen])
        lengths = [len(self.questions[patch.base].encoder[0]["position"]) for patch in chosen]
        before = np.cumsum([0, *lengths[:-1]]).tolist()
        change: Any = OverCrops(ReplaceRows(_index(chosen, before), values), sum(lengths))
        if site == "pattern":
            change = _replaced_pattern(chosen, before, values)
        with intervening(self.loaded, [Edit(stack, layer, site, change)], self.halves):
            return plain_logits(self.loaded, inputs, last)


def _index(chosen: Sequence[Patch], before: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Sample and token, or, all samples being one, the token behind so many `before`."""
    counts = torch.tensor([len(patch.base_rows) for patch in chosen])
    batch = torch.repeat_interleave(torch.arange(len(chosen)), counts)
    rows = torch.from_numpy(np.concatenate([patch.base_rows for patch in chosen]))
    if before is not None:
        batch, rows = torch.zeros_like(batch), rows + torch.tensor(before)[batch]
    return (batch, rows, *_head_index(chosen, counts))


def _replaced_pattern(chosen: Sequence[Patch], before: Sequence[int], values: Tensor) -> ReplacePattern:
    """The rows of attention of each patch, whose sample has so many tokens `before` it."""
    _, rows, *heads = _index(chosen, before)
    counts = torch.tensor([len(patch.base_rows) for patch in chosen])
    first = torch.repeat_interleave(torch.tensor(before), counts)
    return ReplacePattern(rows, first, values, heads[0] if heads else None)


def _head_index(chosen: Sequence[Patch], counts: Tensor) -> tuple[Tensor, ...]:
    if chosen[0].head is None:
        return ()
    heads = torch.tensor([-1 if patch.head is None else patch.head for patch in chosen])
    return (torch.repeat_interleave(heads, counts),)
