"""A question as a model was asked it, ready to be asked again many times with something of it changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import ModelError, UsageError

from .answer_target import AnswerTarget, Target, answer_target
from .answers import to_device
from .batch import Batch, prepare_batch
from .cross_attention import word_tokens
from .dataset import Sample
from .forward import takes
from .models import LoadedModel
from .prompts import Inputs
from .similarity import similarity
from .token_table import Columns, TokenTexts


@dataclass(frozen=True)
class TargetedSample:
    """One sample's batch, its inputs on the model's device, and the number that is explained."""

    loaded: LoadedModel
    batch: Batch
    inputs: Inputs
    target: AnswerTarget

    @property
    def tokens(self) -> Columns:
        """The labels of the decoder's tokens."""
        return self.batch.decoder[0]

    @property
    def patches(self) -> Columns:
        """The labels of the encoder's tokens."""
        return self.batch.encoder[0]

    @cached_property
    def words(self) -> dict[str, NDArray[np.int64]]:
        """The words of the question in order, and the positions of their tokens."""
        return word_tokens(self.loaded, self.batch)

    @property
    def labelled_tokens(self) -> Columns:
        """The labels of the decoder's tokens, and which word of the question each is part of."""
        within = np.full(len(self.tokens["position"]), "", object)
        for word, positions in self.words.items() if self.batch.samples[0].question.strip() else ():
            within[positions] = word
        return {**self.tokens, "in_word": within}

    @property
    def across(self) -> Columns | None:
        """The labels of what the decoder reads by cross-attention; most decoders read nothing that way."""
        if not self.loaded.anatomy.stack("text").attending(cross=True):
            return None
        return self.batch.further["xk"][0]

    @property
    def labelled_across(self) -> Columns | None:
        """The same, with every label that tokens have."""
        if self.across is None:
            return None
        count, own = len(self.across["position"]), self.across
        blank = {"token_id": -1, "token_text": "", "in_word": ""}
        return {
            name: own.get(name, np.full(count, blank.get(name, False), values.dtype))
            for name, values in self.labelled_tokens.items()
        }

    def repeated(self, count: int) -> Inputs:
        """The inputs of `count` copies of the sample in one batch: its images follow it, copy by copy."""
        return {
            name: value.repeat(count, *[1] * (value.ndim - 1)) if count > 1 else value
            for name, value in self.inputs.items()
        }

    def scores(self, count: int = 1, **changed: Tensor) -> Tensor:
        """The target of each of `count` copies, (copy,), float32; with gradients where autograd is on."""
        inputs = {**self.repeated(count), **changed}
        return self.target.of(_logits(self.loaded.model, inputs, int(self.batch.last_prompt[0])))


def target_sample(loaded: LoadedModel, sample: Sample, sample_index: int, target: Target) -> TargetedSample:
    """Prompt and encode a sample, run it once as it is, and find the target in its logits.

    Raises
    ------
    UsageError            the model is in training mode.
    ModelError            the model has neither logits nor a similarity of text and image, or it does not run
                          on transformers.
    SpecificationError    the target is no logit of this model.
    """
    if loaded.engine is not None:
        raise ModelError(
            f"'{loaded.name}' runs on {loaded.backend}, which keeps no gradients.",
            "Load the same model through transformers.",
        )
    if loaded.model.training:
        raise UsageError(
            f"{type(loaded.model).__name__} is in training mode, in which its answers are random.",
            "Call model.eval() first.",
        )
    words = getattr(loaded.processor, "tokenizer", None) or loaded.processor
    batch = prepare_batch(loaded, [sample], sample_index, max_new_tokens=0, texts=TokenTexts(words))
    inputs = to_device(batch.inputs, loaded.model)
    with torch.no_grad():
        logits = _logits(loaded.model, inputs, int(batch.last_prompt[0]))
    return TargetedSample(loaded, batch, inputs, _target(loaded, batch, logits[0], sample, target))


def _target(
    loaded: LoadedModel, batch: Batch, logits: Tensor, sample: Sample, target: Target
) -> AnswerTarget:
    if "input_ids" not in batch.inputs:
        named = getattr(loaded.model.config, "id2label", None) or {}
        labels = {str(label): int(number) for number, label in named.items()}
        return answer_target(target, logits, "", (), None, labels)
    if loaded.model.can_generate():
        return answer_target(target, logits, batch.prompts[0].text, sample.options, loaded.tokenizer, {})
    if len(logits) > 1:
        raise ModelError(
            f"{type(loaded.model).__name__} does not write on where a text ends, so it gives no answer.",
            "Choose a model that writes text, or one that compares text and image.",
        )
    if target is not None:
        raise ModelError(
            "This model writes no text; what it says is how well text and image fit.",
            "Leave target out: the similarity is explained.",
        )
    return AnswerTarget(0, None, "similarity of text and image")


def _logits(model: Any, inputs: Mapping[str, Tensor], last: int) -> Tensor:
    """(copy, word) of the last prompt token; (copy, class) of a classifier; (copy, 1) of what compares."""
    arguments: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    keep = "input_ids" in inputs and takes(model, "logits_to_keep")
    if keep:
        # Logits of the whole vocabulary for every token would be the largest tensor by far.
        arguments["logits_to_keep"] = torch.tensor([last], device=model.device)
    output = model(**inputs, **arguments)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is not None:
        return logits if logits.ndim == 2 else logits[:, 0 if keep else last]
    alike = similarity(output)
    if alike is None:
        raise ModelError(
            f"{type(model).__name__} gives no logits, so there is nothing to explain.",
            "Load it with a head, such as AutoModelForImageClassification, and pass the processor.",
        )
    return alike[:, None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside, and autograd on: a graph has only what depends on the inputs.

    Afterwards every parameter wants gradients as it did before, and none has got one.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
