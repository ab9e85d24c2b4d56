"""From a sample to the model's own prompt, and to processor inputs with the characters of every token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError

from .dataset import Sample
from .roles import tokens_in

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Prompt:
    """The exact text, with one placeholder an image, and where the question stands in it."""

    text: str
    question: tuple[int, int]


@dataclass(frozen=True)
class EncodedPrompts:
    """A batch of prompts as the model takes them, padded on the right.

    `offsets` (token, 2) of each prompt count characters of its question, from the question's first; tokens
    before it have negative ends, so no span of the question contains them.
    """

    inputs: Inputs
    lengths: NDArray[np.int64]
    offsets: list[NDArray[np.int64]]

    def ids(self, row: int) -> NDArray[np.int64]:
        """Token ids of one prompt, without padding."""
        ids: NDArray[np.int64] = self.inputs["input_ids"][row, : self.lengths[row]].numpy()
        return ids


@dataclass(frozen=True)
class Tokens:
    """Token ids and the characters (token, [start, end]) that each stands for."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def within(self, span: tuple[int, int]) -> tuple[list[int], list[list[int]]]:
        """Ids and characters of the tokens that overlap a span."""
        inside = tokens_in([span], self.offsets)
        return self.ids[inside].tolist(), self.offsets[inside].tolist()


def build_prompt(processor: Any, sample: Sample) -> Prompt:
    """The prompt of a sample through the processor's own chat template, images first.

    A processor without a chat template gets the plain one: a placeholder an image, then the question.

    Raises
    ------
    CaptureError    the template changed the question, so that its words cannot be found.
    """
    question = sample.question.strip()
    if template_of(processor) is None:
        text = _placeholder(processor) * len(sample.images) + question
    else:
        # Text alone goes as a plain string: templates of text-only models do not read lists of parts.
        parts = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": question}]
        message = {"role": "user", "content": parts if sample.images else question}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    start = text.rfind(question)
    if start < 0:
        raise CaptureError(
            f"Sample {sample.sample_id!r}: the chat template changed its question, which cannot be found.",
            "Write the question as the template leaves it (its words, single spaces).",
        )
    return Prompt(text, (start, start + len(question)))


def _placeholder(processor: Any) -> str:
    """What stands for an image in a plain prompt: nothing where the processor puts query tokens ahead."""
    if getattr(processor, "num_query_tokens", None):
        return ""
    return str(getattr(processor, "image_token", None) or "")


def template_of(processor: Any) -> str | None:
    """The chat template that `build_prompt` uses, None for the plain one."""
    template = getattr(processor, "chat_template", None)
    return template if isinstance(template, str) else None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def encode_prompts(
    processor: Any, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]]
) -> EncodedPrompts:
    """Run the processor on a batch.

    Raises
    ------
    ModelError      the tokenizer cannot say which characters a token stands for.
    CaptureError    a prompt is too long for a model that reads one length only.
    """
    tokenizer = tokenizer_of(processor)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for.",
            "Roles are found by characters: use a model with a fast tokenizer (a tokenizer.json).",
        )
    texts = [prompt.text for prompt in prompts]
    bos = tokenizer.bos_token
    masked = "attention_mask" in tokenizer.model_input_names
    settings: dict[str, Any] = {
        # Templates that write the first token themselves must not get it twice.
        "add_special_tokens": not (bos and texts[0].startswith(bos)),
        "return_offsets_mapping": True,
        # A model without a mask, such as SigLIP, attends to its padding, and knows one length only.
        "padding": True if masked else "max_length",
        "padding_side": "right",
        "return_tensors": "pt",
    }
    if any(images):
        with warnings.catch_warnings():
            # PaliGemma's processor makes numpy arrays of torch tensors in a way that numpy 2 warns of.
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
            encoded = processor(text=texts, images=[list(each) for each in images], **settings)
    else:
        encoded = tokenizer(texts, **settings)
    # Labels are for training: with them a model computes a loss, and some other masks.
    inputs = {
        name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"
    }
    mapping = inputs.pop("offset_mapping").numpy()
    width = inputs["input_ids"].shape[1]
    if not masked and width != tokenizer.model_max_length:
        raise CaptureError(
            f"A prompt has {width} tokens; this model reads {tokenizer.model_max_length}.",
            "Shorten the question, or leave the sample out.",
        )
    lengths = inputs["attention_mask"].sum(1).numpy() if masked else np.full(len(texts), width)
    offsets = [rows[:length] for rows, length in zip(mapping, lengths, strict=True)]
    if any(images):
        special = settings["add_special_tokens"]
        plain = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
        for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            alone = Tokens(np.array(plain["input_ids"][row]), np.array(plain["offset_mapping"][row]))
            together = Tokens(inputs["input_ids"][row, :length].numpy(), offsets[row])
            offsets[row] = _in_the_prompt(prompt, together, alone).offsets
    starts = [prompt.question[0] for prompt in prompts]
    return EncodedPrompts(inputs, lengths, [each - at for each, at in zip(offsets, starts, strict=True)])


def _in_the_prompt(prompt: Prompt, expanded: Tokens, plain: Tokens) -> Tokens:
    """The tokens of the expanded prompt, counted in characters of the prompt as it is.

    Placeholders, all before the question, grew; so what is behind them is counted from the end, and must then
    be the very tokens of the prompt as it is (some processors put a line break behind it), or CaptureError.
    Tokens that were put ahead of the whole prompt have no characters in it.
    """
    ahead = len(expanded.ids) - len(plain.ids)
    if ahead >= 0 and np.array_equal(expanded.ids[ahead:], plain.ids):
        return Tokens(expanded.ids, np.concatenate([np.full((ahead, 2), -1), plain.offsets]))
    grown = expanded.offsets[:, 1].max() - plain.offsets[:, 1].max()
    for shift in (grown, grown - 1):
        moved = Tokens(expanded.ids, expanded.offsets - shift)
        if moved.within(prompt.question) == plain.within(prompt.question):
            break
    else:
        raise CaptureError(
            f"The processor changes the prompt around a question: {prompt.text[slice(*prompt.question)]!r}.",
            "Its words cannot be found by their characters; this model's processor needs an adapter.",
        )
    return moved


def pad_left(inputs: Inputs) -> Inputs:
    """The same batch with the padding moved to the left, as generation needs it."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    width = inputs["input_ids"].shape[1]
    return {
        name: torch.stack([row.roll(width - n, 0) for row, n in zip(value, lengths, strict=True)])
        if is_token_like(inputs, name)
        else value
        for name, value in inputs.items()
    }


def append_tokens(
    inputs: Inputs,
    lengths: NDArray[np.int64],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    *,
    answer_type: int | None = None,
) -> Inputs:
    """Put each answer behind its prompt: every tensor along the tokens grows, padding stays on the right.

    Answer tokens are text to the model: `mm_token_type_ids` is 0 there, and everything else continues
    as it was at the last prompt token.

    Parameters
    ----------
    answer_type
        What `token_type_ids` are of an answer, where they tell it from the prompt.
    """
    width = int(max(length + len(answer) for length, answer in zip(lengths, answers, strict=True)))
    grown: Inputs = {}
    for name, value in inputs.items():
        if not is_token_like(inputs, name):
            grown[name] = value
            continue
        fill = pad_id if name == "input_ids" else 0
        wide = value.new_full((value.shape[0], width, *value.shape[2:]), fill)
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            wide[row, :length] = value[row, :length]
            if len(answer):
                wide[row, length : length + len(answer)] = _continuation(
                    name, value[row, :length], answer, answer_type
                )
        grown[name] = wide
    return grown


def _continuation(name: str, prompt: Tensor, answer: Sequence[int], answer_type: int | None) -> Tensor:
    if name == "input_ids":
        return prompt.new_tensor(list(answer))
    if name == "attention_mask":
        return prompt.new_ones(len(answer))
    if name == "mm_token_type_ids":
        return prompt.new_zeros(len(answer))
    if name == "token_type_ids" and answer_type is not None:
        return prompt.new_full((len(answer),), answer_type)
    return prompt[-1:].expand(len(answer), *prompt.shape[1:])


def is_token_like(inputs: Inputs, name: str) -> bool:
    """Whether a processor output runs along the tokens, as input_ids does."""
    value, ids = inputs[name], inputs["input_ids"]
    other = name in ("pixel_values", "image_sizes") or name.startswith("qformer_")
    return value.ndim >= 2 and value.shape[:2] == ids.shape and not other
