"""InternVL, Idefics3, SmolVLM: tiles of the scaled image, row by row, and the whole image as the last tile.

Each tile has a grid of its own; the decoder gets one token a square of its patches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mechanistic.store.errors import ModelError

from .patches import Geometry, ImageLayout, Patches, end_to_end, square_grid


def internvl(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """InternVL: the image is stretched to the best grid of tiles; one tile has a class token ahead."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    settings = processor.image_processor
    side, patch = settings.size["height"], model.config.vision_config.patch_size[0]
    _require_side(side, model.config.vision_config.image_size[0])
    cols = rows = 1
    crop = processor.images_kwargs.get("crop_to_patches", settings.crop_to_patches)
    if crop and settings.max_patches > 1:
        cols, rows = get_optimal_tiled_canvas(
            (height, width), (side, side), settings.min_patches, settings.max_patches
        )
    squeezed = patch / model.config.downsample_ratio
    return ImageLayout(
        end_to_end(_tiles(width, height, rows, cols, side, squeezed)),
        end_to_end([tile.behind(1) for tile in _tiles(width, height, rows, cols, side, patch)]),
    )


def idefics3(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """Idefics3 and SmolVLM: the longest edge is scaled, both are stretched to whole tiles."""
    settings = processor.image_processor
    side, patch = settings.max_image_size["longest_edge"], model.config.vision_config.patch_size
    _require_side(side, model.config.vision_config.image_size)
    cols = rows = 1
    if settings.do_image_splitting:
        rows, cols = _idefics3_grid(settings, side, width, height)
    squeezed = patch * model.config.scale_factor
    return ImageLayout(
        end_to_end(_tiles(width, height, rows, cols, side, squeezed)),
        end_to_end(_tiles(width, height, rows, cols, side, patch)),
    )


def _idefics3_grid(settings: Any, side: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles, by the library's own functions."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    if settings.do_resize:
        shape = np.empty((3, height, width), bool)
        height, width = get_resize_output_image_size(shape, settings.size["longest_edge"])
    longer, shorter = max(width, height), min(width, height)
    many = math.ceil(longer / side)
    # As the library computes it: the shorter side follows the aspect ratio of the longer, rounded up.
    aspect = width / height
    follows = int(many * side / aspect) if width >= height else int(many * side * aspect)
    few = math.ceil(max(follows, 1) / side) if shorter else 1
    return (few, many) if width >= height else (many, few)


def _tiles(width: int, height: int, rows: int, cols: int, side: int, patch: float) -> list[Patches]:
    cells = round(side / patch)
    scale_x, scale_y = width / (cols * side), height / (rows * side)
    tiles = [
        square_grid(
            Geometry(width, height, scale_x, scale_y, col * side * scale_x, row * side * scale_y),
            cells,
            cells,
            patch,
        )
        for row in range(rows)
        for col in range(cols)
    ]
    if rows * cols > 1:
        tiles.append(square_grid(Geometry(width, height, width / side, height / side), cells, cells, patch))
    return [tile.as_tile(number) for number, tile in enumerate(tiles)]


def _require_side(processor: int, model: int) -> None:
    if processor != model:
        raise ModelError(
            f"The processor cuts tiles of {processor} pixels, the model takes {model}.",
            "Load model and processor from the same folder.",
        )
