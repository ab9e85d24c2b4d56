"""BLIP as it captions, and as it matches a text with an image: each text layer reads the image.

As it captions, its `generate` changes the prompt: the decoder's own first token takes the place of the
tokenizer's, and the last token, which ends a text, is left out. What is captured is what the decoder then
reads. As it matches, a text encoder reads the text as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from mechanistic.store.errors import ModelError

from .answers import to_device, until
from .coordinates_square import class_token_encoder
from .labelled import Labelled, Tables, with_first_query
from .patches import ImageLayout
from .prompts import EncodedPrompts, Inputs, pad_left

CAPTIONS = "BlipForConditionalGeneration"
MATCHES = "BlipForImageTextRetrieval"


def blip_layout(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """The encoder's class token and patches; among the tokens of the text there is none of the image."""
    if type(model).__name__ not in (CAPTIONS, MATCHES):
        raise ModelError(
            f"{type(model).__name__}: of BLIP's models only {CAPTIONS} and {MATCHES} are captured.",
            "Load the model as one of these two; of the others nothing has been shown.",
        )
    return class_token_encoder(model, processor, width, height, images)


def blip_prompts(loaded: Any, encoded: EncodedPrompts) -> EncodedPrompts:
    """The prompts without the token that ends a text, from the decoder's own first token on."""
    words, ends = loaded.model.config.text_config, encoded.lengths - 1
    ids, mask = encoded.inputs["input_ids"].clone(), encoded.inputs["attention_mask"].clone()
    for row, end in enumerate(ends.tolist()):
        ids[row, end], mask[row, end] = words.pad_token_id, 0
    ids[:, 0] = words.bos_token_id
    width = int(ends.max())
    inputs = {**encoded.inputs, "input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
    offsets = [each[:-1] for each in encoded.offsets]
    return EncodedPrompts(inputs, ends, offsets)


def blip_answers(model: Any, tokenizer: Any, inputs: Inputs, limit: int) -> list[list[int]]:
    """Greedy answers as token ids, without the end token and what comes after it."""
    width, words = inputs["input_ids"].shape[1], model.config.text_config
    if limit == 0:
        return [[] for _ in inputs["input_ids"]]
    left = pad_left(inputs)
    # One more token, for `generate` to leave out.
    left |= {name: nn.functional.pad(left[name], (0, 1)) for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        produced = model.generate(**to_device(left, model), **settings)
    ends = {words.sep_token_id, words.pad_token_id}
    return [until(row, ends) for row in produced[:, width:].cpu().tolist()]


def blip_tables(loaded: Any, batch: Labelled) -> Tables:
    """Every word reads every token of the image encoder, the class token too."""
    keys = [with_first_query(each, np.zeros_like(each["position"])) for each in batch.encoder]
    return {"xq": list(batch.decoder), "xk": keys}
