"""A batch of questions whose answers are measured while something inside the model is changed or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError, SpecificationError, UsageError

from .answer_tokens import AnswerTokens, find_answer_tokens
from .answers import to_device
from .batch import Batch, prepare_batch
from .dataset import Sample
from .encoder_edits import OverCrops
from .interventions import ATTENTION_EDITS, Change, Edit, ReplaceRows, intervening
from .models import LoadedModel
from .pattern_rows import Kept
from .prompts import Inputs
from .residual import Halves, LayerProbe
from .resumed_forward import TOLERANCE, ResumedForward, plain_logits, prove_resumed_forward
from .token_table import TokenTexts

Metric = Literal["logit_diff", "prob", "log_prob"]


@dataclass(frozen=True)
class Trial:
    """Samples, encoded once, to be asked again and again; copies of the batch follow one another.

    `base` are edits of every forward. Where `stream` is known, what goes into each layer in a forward of
    `stream_copies` copies with the base alone, further edits start their forward at the lowest layer that
    they change (see `known`). `resumed` is None for a model whose forward cannot be started in its middle.
    """

    loaded: LoadedModel
    batch: Batch
    inputs: Inputs
    answers: AnswerTokens
    halves: Mapping[str, Halves | None]
    resumed: ResumedForward | None = None
    base: tuple[Edit, ...] = ()
    stream: Mapping[int, Tensor] = field(default_factory=dict)
    stream_copies: int = 1

    @property
    def size(self) -> int:
        """Samples in it."""
        return len(self.batch.samples)

    @property
    def width(self) -> int:
        """Decoder tokens of the longest sample."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def crops(self) -> list[slice]:
        """The image encoder's tokens of each sample, all of them counted end to end."""
        ends = np.cumsum([0, *(len(table["position"]) for table in self.batch.encoder)]).tolist()
        return [slice(*pair) for pair in pairwise(ends)]

    def edit(self, stack: str, layer: int, site: str, change: Change) -> Edit:
        """An edit of (copy * sample, token, ...); in an encoder of (copy, token of all samples, ...)."""
        own = change if stack == "text" else OverCrops(change, self.crops[-1].stop)
        return Edit(stack, layer, site, own)

    def logits(self, edits: Sequence[Edit] = (), copies: int = 1) -> Tensor:
        """Logits (copy * sample, word) of each last prompt token; autograd is as the caller set it.

        Raises like `intervening`.
        """
        inputs = {
            name: value.repeat(copies, *[1] * (value.ndim - 1)) if copies > 1 else value
            for name, value in self.inputs.items()
        }
        last = torch.as_tensor(self.batch.last_prompt, device=self.loaded.model.device).repeat(copies)
        start = first_layer(edits, self.halves.get("text"))
        if start is not None and start in self.stream and self.resumed is not None:
            hidden = self.stream[start].repeat(copies // self.stream_copies, 1, 1)
            # What the base does at the input of that layer and below is in the stream.
            above = [e for e in self.base if (e.layer, e.site != "resid_pre") > (start, False)]
            with intervening(self.loaded, [*above, *edits], self.halves):
                return self.resumed.logits(inputs, last, start, hidden)
        edits = [*self.base, *edits]
        with intervening(self.loaded, edits, self.halves) if edits else nullcontext():
            return plain_logits(self.loaded, inputs, last)

    def known(self, edits: Sequence[Edit] = (), copies: int = 1) -> tuple[Trial, Tensor]:
        """The trial with `edits` as its base, whose forwards need not repeat lower layers; and its logits."""
        layers = range(len(self.loaded.anatomy.stack("text").layers))
        seen, logits = self.read([(layer, "resid_pre") for layer in layers], edits, copies)
        stream = {layer: tensor for (layer, _), tensor in seen.items()}
        return replace(self, base=(*self.base, *edits), stream=stream, stream_copies=copies), logits

    def measure(self, metric: Metric, edits: Sequence[Edit] = (), copies: int = 1) -> Tensor:
        """The metric of every copy of every sample, (copy, sample), float32. Raises like `intervening`."""
        return self.metric_of(self.logits(edits, copies), metric)

    def metric_of(self, logits: Tensor, metric: Metric) -> Tensor:
        """The metric (copy, sample) of logits (copy * sample, word)."""
        logits = logits.reshape(-1, self.size, logits.shape[-1])
        right = self.answers.options.gather(1, self.answers.right[:, None]).expand(len(logits), -1, -1)
        if metric != "logit_diff":
            chosen = logits.log_softmax(-1).gather(-1, right)[..., 0]
            return chosen if metric == "log_prob" else chosen.exp()
        options = self.option_logits(logits)
        others = self.answers.foil_weights()
        return logits.gather(-1, right)[..., 0] - (options.nan_to_num() * others).sum(-1)

    def option_logits(self, logits: Tensor) -> Tensor:
        """Logits (copy, sample, option), NaN where a sample has fewer options."""
        logits = logits.reshape(-1, self.size, logits.shape[-1])
        options = self.answers.options.expand(len(logits), -1, -1)
        found = logits.gather(-1, options.clamp_min(0))
        return found.masked_fill(options < 0, float("nan"))

    def read(
        self,
        sites: Sequence[tuple[int, str]],
        edits: Sequence[Edit] = (),
        copies: int = 1,
        stack: str = "text",
    ) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
        """What (layer, site) are in one forward, after the edits, shaped as in `edit`, and the logits."""
        seen: dict[tuple[int, str], Tensor] = {}
        keepers = [Edit(stack, *each, self._keeper(stack, each, seen)) for each in sites]
        logits = self.logits([*edits, *keepers], copies)
        return seen, logits

    def _keeper(self, stack: str, name: tuple[int, str], seen: dict[tuple[int, str], Tensor]) -> Change:
        if stack == "text":
            return Keep(seen, name)

        def keep(rows: Tensor) -> None:
            seen[name] = rows.unflatten(0, (-1, self.crops[-1].stop))

        return Kept(name[1], keep)


@dataclass(frozen=True)
class Keep:
    """Changes nothing, and keeps what it saw."""

    seen: dict[tuple[int, str], Tensor]
    name: tuple[int, str]

    def __call__(self, tensor: Tensor) -> Tensor:
        self.seen[self.name] = tensor
        return tensor


def first_layer(edits: Sequence[Edit], halves: Halves | None) -> int | None:
    """Where a forward with these edits may start, if anywhere.

    What is edited at a layer's own input, or measured from it, needs the layer below.
    """
    if not edits or any(edit.stack != "text" for edit in edits):
        return None
    lowest = min(edit.layer for edit in edits)
    own = {*ATTENTION_EDITS, "resid_post"}
    if halves is not None and halves.middle is None:
        own |= {"attn_out", "mlp_out"}
    inside = {edit.site for edit in edits if edit.layer == lowest} - own
    return lowest - 1 if inside else lowest


def at_tokens(where: Tensor, copies: int = 1, head: int | None = None) -> tuple[Tensor, ...]:
    """The index of the tokens `where` (sample, token) in every copy; of one head there, if one is named."""
    index: tuple[Tensor, ...] = where.repeat(copies, 1).nonzero(as_tuple=True)
    return index if head is None else (*index, torch.full_like(index[0], head))


def put_back(values: Tensor, where: Tensor, copies: int = 1, head: int | None = None) -> ReplaceRows:
    """The change that puts `values` (sample, token, ...) at the tokens `where` of every copy."""
    index = at_tokens(where, 1, head)
    rows = values[tuple(axis.to(values.device) for axis in index)]
    return ReplaceRows(at_tokens(where, copies, head), rows.repeat(copies, *[1] * (rows.ndim - 1)))


def prepare_trial(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    start: int = 0,
    foils: Sequence[str | None] | None = None,
    metric: str = "logit_diff",
    like: Trial | None = None,
) -> Trial:
    """Prompt, encode and label samples, and find the tokens of their answers.

    Parameters
    ----------
    foils
        For each sample the wrong answer that its right one is compared with; None, all other options.
    like
        An earlier trial of the model, which has shown how its layers work; absent, a few forwards show it.

    Raises
    ------
    SpecificationError    an unknown metric.
    DataError             a sample has no answer, or nothing to compare it with, or an answer has no token of
                          its own.
    UsageError            the model is in training mode.
    ModelError            it computes in another dtype than float32, float16 and bfloat16, or gives no logits.
    """
    if metric not in get_args(Metric):
        raise SpecificationError(
            f"There is no metric '{metric}'.", f"There are {', '.join(get_args(Metric))}."
        )
    if loaded.model.training:
        raise UsageError(
            f"{type(loaded.model).__name__} is in training mode, in which its answers are random.",
            "Call model.eval() first.",
        )
    if loaded.dtype not in TOLERANCE:
        raise ModelError(
            f"This model computes in {loaded.dtype}, in which nothing about it has been proven.",
            f"Load it with dtype= one of {', '.join(TOLERANCE)}.",
        )
    texts = TokenTexts(loaded.tokenizer)
    batch = prepare_batch(loaded, samples, start, max_new_tokens=0, texts=texts, generate=False)
    answers = find_answer_tokens(
        loaded, batch, foils or [None] * len(samples), compared=metric == "logit_diff"
    )
    inputs = to_device(batch.inputs, loaded.model)
    answers = AnswerTokens(*(each.to(loaded.model.device) for each in vars(answers).values()))
    # Whether images enter in higher layers shows only where there are any.
    if like is not None and (any(like.batch.images) or not any(batch.images)):
        return Trial(loaded, batch, inputs, answers, like.halves, like.resumed)
    trial = Trial(loaded, batch, inputs, answers, {})
    return replace(trial, halves=find_halves(trial), resumed=find_resumed(trial))


def find_resumed(trial: Trial) -> ResumedForward | None:
    """How to start the model's forward in its middle; None where that would not be exact."""
    try:
        return prove_resumed_forward(trial.loaded, trial.inputs, torch.as_tensor(trial.batch.last_prompt))
    except CaptureError:
        return None


def find_halves(trial: Trial) -> dict[str, Halves | None]:
    """The children that add up to a layer, by stack, as one forward shows them; None where there are none."""
    anatomy = trial.loaded.anatomy
    tolerance = TOLERANCE[trial.loaded.dtype]
    probes = {
        name: [LayerProbe(layer, tolerance) for layer in stack.layers]
        for name, stack in anatomy.stacks.items()
    }
    with ExitStack() as watching, torch.no_grad():
        for probe in (probe for each in probes.values() for probe in each):
            watching.enter_context(probe.watching())
        trial.logits()
    found: dict[str, Halves | None] = {}
    for name, each in probes.items():
        known = {probe.found[0] if probe.found is not None else None for probe in each}
        found[name] = known.pop() if len(known) == 1 else None
    return found
