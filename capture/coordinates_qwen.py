"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images keep their shape; the decoder gets one token a square of patches.

The encoder sees the patches square by square (the merge blocks), and Qwen2.5-VL window by window besides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import ModelError

from .patches import Geometry, ImageLayout, square_grid


def qwen(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """The layout of one image, sized by the library's own rule."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    settings = processor.image_processor
    patch, merge = settings.patch_size, settings.merge_size
    if (patch, merge) != (
        model.config.vision_config.patch_size,
        model.config.vision_config.spatial_merge_size,
    ):
        raise ModelError(
            f"The processor cuts patches of {patch} pixels, {merge} x {merge} a token; the model does not.",
            "Load model and processor from the same folder.",
        )
    out_h, out_w = height, width
    if settings.do_resize:
        out_h, out_w = smart_resize(
            height,
            width,
            factor=patch * merge,
            min_pixels=settings.size["shortest_edge"],
            max_pixels=settings.size["longest_edge"],
        )
    geometry = Geometry(width, height, width / out_w, height / out_h)
    rows, cols = out_h // patch, out_w // patch
    decoder = square_grid(geometry, rows // merge, cols // merge, patch * merge)
    raster = np.arange(rows * cols).reshape(rows // merge, merge, cols // merge, merge)
    blocks = raster.transpose(0, 2, 1, 3).reshape(-1, merge**2)
    order = blocks[_window_order(model, rows, cols)].reshape(-1)
    return ImageLayout(decoder, square_grid(geometry, rows, cols, patch).take(order))


def _window_order(model: Any, rows: int, cols: int) -> NDArray[np.int64]:
    """In which order the encoder sees the merge blocks: windows first, then blocks, each row by row."""
    config = model.config.vision_config
    merge = config.spatial_merge_size
    row, col = (index.ravel() for index in np.indices((rows // merge, cols // merge)))
    if not hasattr(config, "fullatt_block_indexes"):
        return np.arange(len(row))
    side = config.window_size // config.patch_size // merge
    return np.lexsort((col, row, col // side, row // side))
