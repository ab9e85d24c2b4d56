"""Models that are not captured, and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo_parts import HUB, PLAIN, siglip


def _blip() -> Any:
    text = {**PLAIN, "encoder_hidden_size": 16, "projection_dim": 16}
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    return HUB.BlipForConditionalGeneration(HUB.BlipConfig(text_config=text, vision_config=tower))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "blip": (
        _blip,
        r"could not establish the id of the image token .*; the attention of the text stack, which is code "
        r"of its own; the attention of the vision stack",
    ),
}
