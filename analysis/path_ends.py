"""Where paths begin and end: heads and MLPs that send, inputs of heads and the logits that receive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechanistic.store.errors import SpecificationError

INPUTS = ("q", "k", "v")
LOGITS = "logits"
MLP = "mlp"

# (layer, head), or (layer, "mlp").
Sender = tuple[int, int | str]
# (layer, head, input); the logits are (number of layers, -1, "logits").
Receiver = tuple[int, int, str]


def chosen_senders(wanted: Sequence[Sender] | None, shape: tuple[int, int, int]) -> tuple[Sender, ...]:
    """The senders asked for, all by default; `shape` is layers, heads, key heads. SpecificationError."""
    layers, heads, _ = shape
    if wanted is None:
        names: list[int | str] = [*range(heads), MLP]
        return tuple((layer, name) for layer in range(layers) for name in names)
    for layer, name in wanted:
        known = name == MLP or (isinstance(name, int | np.integer) and 0 <= name < heads)
        if not (0 <= layer < layers and known):
            raise SpecificationError(
                f"There is no sender ({layer}, {name!r}); the decoder has {layers} layers of {heads} heads.",
                "Name (layer, head) or (layer, 'mlp'), numbered from 0.",
            )
    return tuple((int(layer), name if name == MLP else int(name)) for layer, name in wanted)


def chosen_receivers(
    wanted: Sequence[tuple[int, int] | str] | None, inputs: Sequence[str], shape: tuple[int, int, int]
) -> tuple[Receiver, ...]:
    """The receivers asked for, all by default, each once. SpecificationError if one does not exist."""
    layers, heads, kv_heads = shape
    if unknown := [name for name in inputs if name not in INPUTS]:
        raise SpecificationError(f"A head has no input '{unknown[0]}'.", f"It has {', '.join(INPUTS)}.")
    if wanted is None:
        wanted = [*((layer, head) for layer in range(layers) for head in range(heads)), LOGITS]
    found: dict[Receiver, None] = {}
    for each in wanted:
        if each == LOGITS:
            found[layers, -1, LOGITS] = None
            continue
        if isinstance(each, str) or not (0 <= each[0] < layers and 0 <= each[1] < heads):
            raise SpecificationError(
                f"There is no receiver {each!r}; the decoder has {layers} layers of {heads} heads.",
                "Name (layer, head), numbered from 0, or 'logits'.",
            )
        layer, head = int(each[0]), int(each[1])
        for name in inputs:
            found[layer, head if name == "q" else head * kv_heads // heads, name] = None
    return tuple(found)
