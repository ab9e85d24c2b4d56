"""Families whose encoder sees an image as one picture of a fixed size: LLaVA, Gemma 3, PaliGemma, CLIP, ViT.

What differs is how many tokens stand before the patches, and what the decoder gets of them.
"""

from __future__ import annotations

import math
from typing import Any

from mechanistic.store.errors import ModelError

from .patches import NO_PATCHES, Geometry, ImageLayout, Patches, square_grid


def resized_and_cropped(processor: Any, width: int, height: int) -> tuple[Geometry, int, int]:
    """The geometry of a processor that pads to a square, resizes, then crops the centre, each where it does.

    Returns the geometry and the width and height of what comes out.
    """
    scale_x = scale_y = 1.0
    offset_x = offset_y = 0.0
    now_w, now_h = width, height
    if getattr(processor, "do_pad", False):
        now_w = now_h = max(width, height)
        offset_x, offset_y = -float((now_w - width) // 2), -float((now_h - height) // 2)
    if processor.do_resize:
        new_h, new_w = _resized(processor.size, now_w, now_h)
        scale_x, scale_y = now_w / new_w, now_h / new_h
        now_w, now_h = new_w, new_h
    if getattr(processor, "do_center_crop", False):
        crop_w, crop_h = processor.crop_size["width"], processor.crop_size["height"]
        offset_x += (now_w - crop_w) // 2 * scale_x
        offset_y += (now_h - crop_h) // 2 * scale_y
        now_w, now_h = crop_w, crop_h
    return Geometry(width, height, scale_x, scale_y, offset_x, offset_y), now_w, now_h


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    """Height and width after the library's own resize, by the library's own functions."""
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    wanted = {key: value for key, value in dict(size).items() if value}
    if "shortest_edge" in wanted:
        edges = get_size_with_aspect_ratio(
            (height, width), wanted["shortest_edge"], wanted.get("longest_edge")
        )
    elif "max_height" in wanted:
        edges = get_image_size_for_max_height_width(
            (height, width), wanted["max_height"], wanted["max_width"]
        )
    else:
        edges = (wanted["height"], wanted["width"])
    return int(edges[0]), int(edges[1])


def encoder_grid(model: Any, processor: Any, width: int, height: int) -> tuple[Geometry, Patches]:
    """Geometry, and the patches of an image that is resized and cropped to one size."""
    images = getattr(processor, "image_processor", processor)
    geometry, out_w, out_h = resized_and_cropped(images, width, height)
    patch = vision_config(model).patch_size
    return geometry, square_grid(geometry, out_h // patch, out_w // patch, patch)


def vision_config(model: Any) -> Any:
    """The configuration of the image encoder; an encoder on its own has but one."""
    return getattr(model.config, "vision_config", model.config)


def llava(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """LLaVA 1.5: the decoder gets the patches, without the class token under the strategy "default"."""
    _, grid = encoder_grid(model, processor, width, height)
    encoder = grid.behind(processor.num_additional_image_tokens)
    strategy = model.config.vision_feature_select_strategy
    return ImageLayout(grid if strategy == "default" else encoder, encoder)


def paligemma(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """PaliGemma: the decoder gets every patch."""
    _, grid = encoder_grid(model, processor, width, height)
    return ImageLayout(grid, grid)


def gemma3(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """Gemma 3: the decoder gets means over squares of patches, `mm_tokens_per_image` of them."""
    if processor.image_processor.do_pan_and_scan:
        raise ModelError(
            "This Gemma 3 processor crops images by pan and scan, whose crops are not labelled.",
            "Set processor.image_processor.do_pan_and_scan = False.",
        )
    geometry, grid = encoder_grid(model, processor, width, height)
    side = math.isqrt(model.config.mm_tokens_per_image)
    patch = vision_config(model).patch_size * math.isqrt(len(grid)) // side
    return ImageLayout(square_grid(geometry, side, side, patch), grid)


def class_token_encoder(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """CLIP, ViT, DINOv2: a class token, registers where there are some, then the patches; no decoder."""
    _, grid = encoder_grid(model, processor, width, height)
    ahead = 1 + int(getattr(vision_config(model), "num_register_tokens", 0))
    return ImageLayout(NO_PATCHES, grid.behind(ahead))


def bare_encoder(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """SigLIP: nothing but patches; no decoder."""
    _, grid = encoder_grid(model, processor, width, height)
    return ImageLayout(NO_PATCHES, grid)
