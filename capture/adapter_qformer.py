"""BLIP-2 and InstructBLIP: learned queries read the image by cross-attention, and the decoder reads them.

A query has no place in the image: it is of kind image, with the number of its image, and its tile, row and
column are -1. InstructBLIP's queries attend to the words of the prompt too, in a tokenizer of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mechanistic.store.errors import CaptureError

from .coordinates_square import encoder_grid
from .labelled import Labelled, Tables, with_first_query
from .patches import ImageLayout, placeless
from .token_table import Columns, TokenTexts, decoder_table, joined, query_table


def qformer_layout(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """The encoder's class token and patches; of the decoder's tokens none has a place."""
    _, grid = encoder_grid(model, processor, width, height)
    return ImageLayout(placeless(model.config.num_query_tokens), grid.behind(1))


def blip2_tables(loaded: Any, batch: Labelled) -> Tables:
    """The queries are all that the Q-Former sees; each reads every token of the image encoder."""
    queries = _queries(loaded, batch)
    return {"qformer": queries, "xq": queries, "xk": _keys(batch)}


def instructblip_tables(loaded: Any, batch: Labelled) -> Tables:
    """The queries, then the words of the prompt, which do not cross over."""
    queries, tokenizer = _queries(loaded, batch), loaded.processor.qformer_tokenizer
    encoded = tokenizer([prompt.text for prompt in batch.prompts], return_offsets_mapping=True)
    texts = TokenTexts(tokenizer)
    both = []
    for row, (sample, prompt) in enumerate(zip(batch.samples, batch.prompts, strict=True)):
        ids = np.asarray(encoded["input_ids"][row], np.int64)
        given = batch.inputs["qformer_input_ids"][row, : len(ids)].numpy()
        if not np.array_equal(ids, given) or batch.inputs["qformer_attention_mask"][row].sum() != len(ids):
            raise CaptureError(
                f"Sample {sample.sample_id!r}: the Q-Former gets other words than its tokenizer gives.",
                "The processor is not the one that came with the model; load both from one folder.",
            )
        offsets = np.asarray(encoded["offset_mapping"][row], np.int64) - prompt.question[0]
        at = int(queries[row]["sample_index"][0])
        words = decoder_table(sample, at, ids, (), offsets, (), None, texts)
        words["is_last_prompt"][:] = False
        words["position"] += len(queries[row]["position"])
        both.append(joined([queries[row], words]))
    return {"qformer": both, "xq": queries, "xk": _keys(batch)}


def _queries(loaded: Any, batch: Labelled) -> list[Columns]:
    count = loaded.model.config.num_query_tokens
    return [query_table(int(columns["sample_index"][0]), count) for columns in batch.decoder]


def _keys(batch: Labelled) -> list[Columns]:
    return [with_first_query(each, np.zeros_like(each["position"])) for each in batch.encoder]
