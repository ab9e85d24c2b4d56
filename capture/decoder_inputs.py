"""What a decoder is given, image features among its words: seen, or replaced, in the model's own call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import CaptureError

DEEPSTACK = "deepstack_visual_embeds"
# What a decoder calls the image that it reads by cross-attention: Mllama, BLIP.
ACROSS = ("cross_attention_states", "encoder_hidden_states")


@dataclass(frozen=True)
class DecoderInputs:
    """embeddings (sample, token, d_model); deepstack, where a decoder gets image features in higher layers
    too (Qwen3-VL), a tensor (image token of all samples, d_model) for each such layer; across, where it reads
    the image by cross-attention, (sample, key, d_image).
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()
    across: Tensor | None = None


@contextmanager
def changed_decoder_inputs(model: Any, change: Callable[[DecoderInputs], DecoderInputs]) -> Iterator[None]:
    """Give the decoder what `change` makes of its inputs; masks and positions stay the model's own.

    Raises
    ------
    CaptureError    the decoder was not called, or got neither embeddings nor tokens, so nothing was changed.
    """
    decoder: nn.Module = model.get_decoder()
    signature = inspect.signature(decoder.forward)
    calls: list[int] = []

    def enter(module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        bound = signature.bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if embeddings is None and ids is not None:
            embeddings = module.get_input_embeddings()(ids)
        if embeddings is None:
            raise CaptureError(
                f"{type(module).__name__} was given neither embeddings nor tokens.",
                "This architecture needs an adapter; until it has one, its embeddings cannot be reached.",
            )
        read = next((name for name in ACROSS if given.get(name) is not None), None)
        across = None if read is None else given[read].reshape(len(embeddings), -1, given[read].shape[-1])
        new = change(DecoderInputs(embeddings, tuple(given.get(DEEPSTACK) or ()), across))
        calls.append(1)
        # A copy, since a decoder may add its positions in place (BLIP).
        given |= {"input_ids": None, "inputs_embeds": new.embeddings.clone()}
        if new.deepstack:
            given[DEEPSTACK] = list(new.deepstack)
        if read is not None and new.across is not None:
            given[read] = new.across.reshape(given[read].shape)
        return (), given

    handle = decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise CaptureError(
            f"{type(decoder).__name__} was not called, so its embeddings were not reached.",
            "This architecture needs an adapter; until it has one, choose to='pixels'.",
        )
