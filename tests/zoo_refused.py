"""Models that are not captured, and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo_parts import HUB, PLAIN, TEXT, VOCABULARY, siglip


def _mllama() -> Any:
    vision = {
        **siglip(),
        "num_global_layers": 1,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }
    vision.pop("vision_use_head")
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = HUB.MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY["<image>"])
    return HUB.MllamaForConditionalGeneration(config)


def _queried(name: str) -> Any:
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    opt = {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 99}
    config = getattr(HUB, f"{name}Config")(
        vision_config=tower,
        qformer_config={**PLAIN, "hidden_size": 16, "num_attention_heads": 2, "encoder_hidden_size": 16},
        text_config={**PLAIN, **opt},
        num_query_tokens=4,
        image_token_index=VOCABULARY["<image>"],
    )
    return getattr(HUB, f"{name}ForConditionalGeneration")(config)


def _blip() -> Any:
    text = {**PLAIN, "encoder_hidden_size": 16, "projection_dim": 16}
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    return HUB.BlipForConditionalGeneration(HUB.BlipConfig(text_config=text, vision_config=tower))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mllama": (_mllama, r"2 lists of layers \(transformer\.layers, global_transformer\.layers\)"),
    "blip-2": (lambda: _queried("Blip2"), r"where the image tokens of 'blip-2' lie"),
    "instructblip": (lambda: _queried("InstructBlip"), r"where the image tokens of 'instructblip' lie"),
    "blip": (_blip, r"could not establish the id of the image token"),
}
