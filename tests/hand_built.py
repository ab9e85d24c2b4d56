"""A small Llama built by hand, whose answer is moved by one known head, or by one known path of two heads.

Red means left and green means right. Everything else in it, the other heads and the MLPs, is random, reads
everything and writes where nobody looks. One coordinate of the residual stream is so large that the norms
divide by it alone, which makes them (nearly) the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from zoo_parts import HUB, IDS, VOCABULARY, tokenizer

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel

WIDTH, HEADS, HEAD_WIDTH, LAYERS = 32, 4, 8, 3
CONSTANT = 1000.0
# Coordinates of the residual stream.
BIG, RED, GREEN, IS_COLOUR, SQUARE, CIRCLE, IS_LAST, MOVED_RED, MOVED_GREEN, LEFT, RIGHT = range(11)
WORD = slice(11, 19)
NOBODY_LOOKS = slice(19, 32)
# Wide enough for a softmax of one key among ten to be 1 in single precision.
SHARP = 8.0
# Where the planted heads are: (layer, head).
ONLY = (1, 2)
FIRST, SECOND = (0, 1), (2, 3)
# Positions in `question`, behind <s>.
AT_COLOUR, AT_SQUARE, AT_CIRCLE, AT_LAST = 4, 5, 9, 10


@dataclass(frozen=True)
class Head:
    """What one head looks for (query coordinate, key coordinate, gain) and carries (from, to)."""

    looks: tuple[tuple[int, int, float], ...]
    carries: tuple[tuple[int, int], ...]


def question(colour: str, start: str = "where") -> str:
    """The one question, in two colours."""
    return f"{start} is the {colour} square relative to the circle ?"


def pair(number: int, start: str = "where") -> tuple[Sample, Sample]:
    """A minimal pair: the same question about red (left) and green (right)."""
    red, green = (
        Sample(
            sample_id=f"{number}-{colour}",
            images=(),
            question=question(colour, start),
            options=("left", "right"),
            answer=answer,
            relation=answer,
            subject=f"{colour} square",
            object="circle",
            group=f"pair-{number}",
        )
        for colour, answer in (("red", "left"), ("green", "right"))
    )
    return red, green


def pairs(count: int = 3) -> tuple[Sample, ...]:
    """`count` pairs of one length, one after another."""
    starts = ("where", "what", "which", "in", "to", "and")
    return tuple(sample for number in range(count) for sample in pair(number, starts[number]))


def one_head(*, linear: bool = False) -> LoadedModel:
    """The head `ONLY` looks from the last token at the colour, and writes the answer."""
    heads = {ONLY: Head(((IS_LAST, IS_COLOUR, 1.0),), ((RED, LEFT), (GREEN, RIGHT)))}
    return _build(heads, linear=linear)


def two_steps(via: str) -> LoadedModel:
    """The head `FIRST` moves the colour to where `SECOND` finds it, in its query, its keys or its values."""
    to_square = ((SQUARE, IS_COLOUR, 1.0),)
    move = ((RED, MOVED_RED), (GREEN, MOVED_GREEN))
    name = ((SQUARE, LEFT), (CIRCLE, RIGHT))
    chosen = {
        "v": (
            Head(to_square, move),
            Head(((IS_LAST, SQUARE, 1.0),), ((MOVED_RED, LEFT), (MOVED_GREEN, RIGHT))),
        ),
        "k": (
            Head(to_square, move),
            # Without a colour moved there both nouns have a key of one half.
            Head(
                (
                    (IS_LAST, SQUARE, 0.5),
                    (IS_LAST, CIRCLE, 0.5),
                    (IS_LAST, MOVED_RED, 1.0),
                    (IS_LAST, MOVED_GREEN, -1.0),
                ),
                name,
            ),
        ),
        "q": (
            Head(((IS_LAST, IS_COLOUR, 1.0),), move),
            Head(((MOVED_RED, SQUARE, 1.0), (MOVED_GREEN, CIRCLE, 1.0)), name),
        ),
    }[via]
    return _build(dict(zip((FIRST, SECOND), chosen, strict=True)))


def _build(heads: dict[tuple[int, int], Head], *, linear: bool = False) -> LoadedModel:
    config = HUB.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        # So slow that all but the first pair of a head's coordinates stand still.
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        **IDS,
    )
    model: Any = HUB.LlamaForCausalLM(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for norm in (model.model.norm, *(norm for layer in model.model.layers for norm in _norms(layer))):
            norm.weight.fill_(CONSTANT / math.sqrt(WIDTH))
        _write_words(model)
        for layer in model.model.layers:
            _hide(layer, linear)
        for (number, head), planted in heads.items():
            _plant(model.model.layers[number].self_attn, head, planted, linear)
    return LoadedModel(model, tokenizer(), "hand-built")


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _write_words(model: Any) -> None:
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    embedding[:, : WORD.start] = 0
    embedding[:, NOBODY_LOOKS] = 0
    embedding[:, BIG] = CONSTANT
    for word, *coordinates in (
        ("red", RED, IS_COLOUR),
        ("green", GREEN, IS_COLOUR),
        ("square", SQUARE),
        ("circle", CIRCLE),
        ("?", IS_LAST),
    ):
        embedding[VOCABULARY[word], coordinates] = 1.0
    unembedding.zero_()
    unembedding[VOCABULARY["left"], LEFT] = 4.0
    unembedding[VOCABULARY["right"], RIGHT] = 4.0


def _hide(layer: Any, linear: bool) -> None:
    """Let everything that was drawn at random write where nobody looks; nobody reads the big coordinate."""
    attention, mlp = layer.self_attn, layer.mlp
    for weight in (*(getattr(attention, f"{name}_proj").weight for name in "qkv"), mlp.gate_proj.weight):
        weight[:, BIG] = 0
    mlp.up_proj.weight[:, BIG] = 0
    for weight in (attention.o_proj.weight, mlp.down_proj.weight):
        weight[: NOBODY_LOOKS.start] = 0
        if linear and weight is mlp.down_proj.weight:
            weight.zero_()
    if linear:
        attention.q_proj.weight.zero_()


def _plant(attention: Any, head: int, planted: Head, linear: bool) -> None:
    rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    for name in "qkv":
        getattr(attention, f"{name}_proj").weight[rows] = 0
    attention.o_proj.weight[:, rows] = 0
    # The first coordinate of each half turns with the position.
    places: list[int] = [place for place in range(HEAD_WIDTH) if place % (HEAD_WIDTH // 2)]

    def of(name: str) -> Tensor:
        weight: Tensor = getattr(attention, f"{name}_proj").weight
        return weight[rows]

    for place, (query, key, gain) in zip(places, () if linear else planted.looks, strict=False):
        of("q")[place, query] = SHARP * gain
        of("k")[place, key] = SHARP
    for place, (source, target) in zip(places, planted.carries, strict=False):
        of("v")[place, source] = 1.0
        attention.o_proj.weight[target, head * HEAD_WIDTH + place] = 1.0
