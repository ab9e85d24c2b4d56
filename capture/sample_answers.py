"""What a model says to each sample of a batch, whether that is right, and the logits of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.schema import CORRECT

from .answers import option_logits, option_tokens, score
from .backend import Captured
from .dataset import Sample


@dataclass(frozen=True)
class SampleAnswers:
    """One entry a sample; `logits` (sample, option) are NaN where an option has none, and `notes` say why."""

    predictions: list[str]
    correct: list[int]
    logits: NDArray[np.float32]
    notes: list[str]


def sample_answers(captured: Captured, tokenizer: Any, *, options: int, written: bool) -> SampleAnswers:
    """What was written and, of a model that compares texts with an image, which option fits best.

    Parameters
    ----------
    tokenizer
        None where the model reads images alone; its prompts are empty.
    options
        The most options that a sample of the run has.
    written
        Whether answers were asked for; else what is written is unscored.
    """
    batch = captured.batch
    if captured.similarities is not None:
        return _compared(captured.similarities, batch.samples, options)
    tokens = [
        option_tokens(tokenizer, prompt.text, sample.options if prompt.text else ())
        for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
    ]
    predictions = [
        tokenizer.decode(answer, skip_special_tokens=True).strip() if answer else ""
        for answer in batch.answers
    ]
    correct = [
        score(said, sample) if written else CORRECT["unscored"]
        for said, sample in zip(predictions, batch.samples, strict=True)
    ]
    logits = option_logits(captured.logits, tokens, options)
    return SampleAnswers(predictions, correct, logits, [each.note for each in tokens])


def _compared(
    similarities: Sequence[Sequence[float]], samples: Sequence[Sample], width: int
) -> SampleAnswers:
    values = np.full((len(samples), width), np.nan, np.float32)
    predictions, correct, notes = [], [], []
    for row, (found, sample) in enumerate(zip(similarities, samples, strict=True)):
        values[row, : len(found)] = found
        best = [option for option, each in zip(sample.options, found, strict=False) if each == max(found)]
        # Of two that fit equally well none has been chosen.
        predictions.append(best[0] if len(best) == 1 else "")
        right = "correct" if predictions[row] == sample.answer else "incorrect"
        correct.append(CORRECT[right if found and sample.answer is not None else "unscored"])
        alone = found or not sample.options
        notes.append("" if alone else f"compared with one image, and there are {len(sample.images)}")
    return SampleAnswers(predictions, correct, values, notes)
