"""What the model answers, whether it is right, and the logits of the options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mechanistic.store.schema import CORRECT

from .dataset import Sample
from .prompts import Inputs, pad_left


@dataclass(frozen=True)
class OptionTokens:
    """The first answer token of each option; None where options share it, and then `note` says so."""

    ids: tuple[int | None, ...]
    note: str


def generate_answers(model: nn.Module, tokenizer: Any, inputs: Inputs, limit: int) -> list[list[int]]:
    """Greedy answers as token ids, without the end token and what comes after it.

    The model's own generation settings decide what ends an answer; they are used without sampling.
    """
    rows = inputs["input_ids"].shape[0]
    if limit == 0:
        return [[] for _ in range(rows)]
    on_device = to_device(pad_left(inputs), model)
    generator: Any = model
    ends = end_ids(generator, tokenizer)
    with torch.no_grad():
        produced = generator.generate(
            **on_device,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id(tokenizer),
        )
    new = produced[:, inputs["input_ids"].shape[1] :].cpu().tolist()
    return [until(row, ends) for row in new]


def pad_id(tokenizer: Any) -> int:
    """The padding token's id, or the end token's where a tokenizer has none."""
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(chosen if chosen is not None else 0)


def to_device(inputs: Inputs, model: Any) -> Inputs:
    """Inputs on the model's device, floating ones in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def option_tokens(tokenizer: Any, prompt: str, options: Sequence[str]) -> OptionTokens:
    """First answer token of each option, as it would follow the prompt.

    The option follows a prompt that ends in white space directly, any other after one space.
    """
    joint = "" if prompt[-1:].isspace() else " "
    tail = prompt[-32:]
    starts = [_first_token(tokenizer, tail, joint, option) for option in options]
    shared = sorted(
        {option for option, start in zip(options, starts, strict=True) if starts.count(start) > 1}
    )
    ids = tuple(None if start is None or starts.count(start) > 1 else start for start in starts)
    notes = []
    if shared:
        notes.append(f"first token shared: {', '.join(shared)}")
    merged = [option for option, start in zip(options, starts, strict=True) if start is None]
    if merged:
        notes.append(f"no token of its own: {', '.join(merged)}")
    return OptionTokens(ids, "; ".join(notes))


def option_logits(
    logits: NDArray[np.float32] | None, tokens: Sequence[OptionTokens], width: int
) -> NDArray[np.float32]:
    """Logits (sample, option) at the last prompt token of each option's first token, NaN where it has none.

    Parameters
    ----------
    logits
        (sample, vocabulary), None for a model that has none.
    """
    values = np.full((len(tokens), width), np.nan, np.float32)
    if logits is not None:
        for row, options in enumerate(tokens):
            for place, token in enumerate(options.ids):
                if token is not None:
                    values[row, place] = logits[row, token]
    return values


def score(prediction: str, sample: Sample) -> int:
    """Correct, incorrect, or unscored where the right answer is not known.

    An answer names an option when, but for case, spaces and punctuation around it, it is that option, or when
    it mentions that option and no other as whole words. Without options it must be the right answer itself.
    """
    if sample.answer is None:
        return CORRECT["unscored"]
    said = normalise(prediction)
    if not sample.options:
        return CORRECT["correct" if said == normalise(sample.answer) else "incorrect"]
    named = [option for option in sample.options if normalise(option) == said]
    if not named:
        named = [option for option in sample.options if _mentions(said, normalise(option))]
    return CORRECT["correct" if named == [sample.answer] else "incorrect"]


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation or white space at either end."""
    return re.sub(r"\s+", " ", text.replace("_", " ")).casefold().strip(" .,:;!?\"'`*()[]")


def _mentions(said: str, option: str) -> bool:
    return bool(option) and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said) is not None


def _first_token(tokenizer: Any, tail: str, joint: str, option: str) -> int | None:
    encoded = tokenizer(tail + joint + option, add_special_tokens=False, return_offsets_mapping=True)
    at = len(tail) + len(joint)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if start <= at < end:
            # A token that also covers the prompt's end is not the option's; "unknown" is nobody's.
            return int(token) if start >= len(tail) and token != tokenizer.unk_token_id else None
    return None


def until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer, by the model's generation settings and its tokenizer."""
    settings = getattr(model, "generation_config", None)
    ends: set[int] = set()
    for value in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id, tokenizer.pad_token_id):
        ends |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    return ends
