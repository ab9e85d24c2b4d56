"""Which part of which image a token stands for, by family.

A family's layout says in which order its encoder and its decoder see the patches of one image, and takes
them back to pixels of the original. Each is proven in the tests by perturbing pixels and seeing which tokens
move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mechanistic.store.errors import ModelError

from .adapter_blip import blip_layout
from .adapter_mllama import mllama_layout
from .adapter_qformer import qformer_layout
from .coordinates_anyres import llava_next, llava_onevision
from .coordinates_qwen import qwen
from .coordinates_square import bare_encoder, class_token_encoder, gemma3, llava, paligemma
from .coordinates_tiles import idefics3, internvl
from .patches import ImageLayout

Layout = Callable[[Any, Any, int, int, int], ImageLayout]

# By the `model_type` of the configuration.
LAYOUTS: Mapping[str, Layout] = {
    "blip": blip_layout,
    "blip-2": qformer_layout,
    "instructblip": qformer_layout,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "mllama": mllama_layout,
    "paligemma": paligemma,
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "clip": class_token_encoder,
    "vit": class_token_encoder,
    "dinov2": class_token_encoder,
    "siglip": bare_encoder,
    "smolvlm": idefics3,
}


def image_layout(model: Any, processor: Any, width: int, height: int, *, images: int = 1) -> ImageLayout:
    """The layout of an image of the given original size.

    Parameters
    ----------
    images
        How many images its sample has: some families cut an image into tiles only if it is alone.

    Raises
    ------
    ModelError    nothing is known about how this family lays out its image tokens.
    """
    family = model.config.model_type
    if family not in LAYOUTS:
        raise ModelError(
            f"Nothing is known about where the image tokens of '{family}' lie in the image.",
            f"Image coordinates are known for: {', '.join(sorted(LAYOUTS))}.",
        )
    return LAYOUTS[family](model, processor, width, height, images)
