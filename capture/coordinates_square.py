"""Families whose encoder sees an image as one picture of a fixed size: LLaVA, Gemma 3, PaliGemma, CLIP, ViT.

What differs is how many tokens stand before the patches, and what the decoder gets of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .patches import NO_PATCHES, Geometry, ImageLayout, Patches, end_to_end, square_grid


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
    """Gemma 3: the decoder gets means over squares of patches, `mm_tokens_per_image` of them.

    The image as a whole is tile 0; pan and scan, where it is on, puts crops behind it, each stretched alike.
    """
    side = math.isqrt(model.config.mm_tokens_per_image)
    parts: list[ImageLayout] = []
    for left, top, crop_w, crop_h in [(0, 0, width, height), *_pan_and_scan(processor, width, height)]:
        crop, grid = encoder_grid(model, processor, crop_w, crop_h)
        geometry = replace(crop, width=width, height=height, offset_x=left, offset_y=top)
        patch = vision_config(model).patch_size
        cells = math.isqrt(len(grid))
        squares, patches = ((side, patch * cells // side), (cells, patch))
        both = [square_grid(geometry, n, n, size).as_tile(len(parts)) for n, size in (squares, patches)]
        parts.append(ImageLayout(*both))
    return ImageLayout(
        end_to_end([each.decoder for each in parts]), end_to_end([each.encoder for each in parts])
    )


def _pan_and_scan(processor: Any, width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, width and height of each crop, by the library's own function; they follow one another."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    # What a processor says of images holds before what its image processor says by itself.
    settings = processor.image_processor
    names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
    given = {
        name: getattr(settings, name) for name in ("do_pan_and_scan", *(f"pan_and_scan_{n}" for n in names))
    }
    given |= {name: value for name, value in getattr(processor, "images_kwargs", {}).items() if name in given}
    if not given.pop("do_pan_and_scan"):
        return
    left = top = 0
    for crop in Gemma3ImageProcessorPil.pan_and_scan(settings, np.empty((1, height, width), bool), **given):
        crop_h, crop_w = crop.shape[1:]
        yield left, top, crop_w, crop_h
        left, top = (left + crop_w, 0) if width >= height else (0, top + crop_h)


def class_token_encoder(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """CLIP, ViT, DINOv2: a class token, registers where there are some, then the patches; no decoder."""
    _, grid = encoder_grid(model, processor, width, height)
    ahead = 1 + int(getattr(vision_config(model), "num_register_tokens", 0))
    return ImageLayout(NO_PATCHES, grid.behind(ahead))


def bare_encoder(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """SigLIP: nothing but patches; no decoder."""
    _, grid = encoder_grid(model, processor, width, height)
    return ImageLayout(NO_PATCHES, grid)
