"""How an engine answers: greedily, by the model's own settings, as `answers.generate_answers` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechanistic.store.errors import ModelError

from .answers import end_ids
from .models import LoadedModel

# Settings of generation that change what is greedily said, and what each is when it changes nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
}


def sampling(loaded: LoadedModel, limit: int) -> Any:
    """vLLM's SamplingParams for answers of at most `limit` tokens.

    One token more is asked for, so that the last one of an answer goes through the layers too.

    Raises
    ------
    ModelError    the model's settings make vLLM answer otherwise than transformers.
    """
    from vllm import SamplingParams

    settings = loaded.model.generation_config
    for name, harmless in _REFUSED.items():
        value = getattr(settings, name, None)
        if limit and value not in harmless:
            raise ModelError(
                f"This model generates with {name}={value!r}, which vLLM does otherwise.",
                "Capture it with --backend transformers, or without answers: --max-new-tokens 0.",
            )
    return SamplingParams(
        temperature=0.0,
        max_tokens=limit + 1 if limit else 1,
        stop_token_ids=sorted(end_ids(loaded.model, loaded.tokenizer)),
        repetition_penalty=getattr(settings, "repetition_penalty", None) or 1.0,
        detokenize=False,
    )
