"""Models that are not captured, and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo_parts import HUB, PLAIN, siglip


def _blip_that_answers() -> Any:
    text = {**PLAIN, "encoder_hidden_size": 16, "projection_dim": 16}
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    return HUB.BlipForQuestionAnswering(HUB.BlipConfig(text_config=text, vision_config=tower))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "blip_that_answers": (
        _blip_that_answers,
        r"BlipForQuestionAnswering: could not establish .*how prompt and answer divide over its text encoder "
        r"and decoder",
    ),
}
