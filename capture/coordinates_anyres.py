"""LLaVA-NeXT and LLaVA-OneVision: the whole image as tile 0, then tiles of a larger, padded version of it.

The decoder gets the tiles joined, without the rows and columns that are all padding, and a newline token
behind each row. Which patch comes where is found by packing patch numbers with the model's own code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mechanistic.store.errors import CaptureError, ModelError

from .patches import Geometry, ImageLayout, Patches, end_to_end, square_grid


def llava_next(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """Every image is cut into tiles."""
    side, patch = _sides(model, processor)
    tiles = [_whole(side, patch, width, height), *_cut(processor, side, patch, width, height)]
    strategy = model.config.vision_feature_select_strategy
    return _packed(model, tiles, width, height, {"vision_feature_select_strategy": strategy})


def llava_onevision(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """An image that is alone is cut into tiles; of several, each is padded to a square and is one tile."""
    side, patch = _sides(model, processor)
    if images == 1:
        tiles = [_whole(side, patch, width, height), *_cut(processor, side, patch, width, height)]
    else:
        square = max(width, height)
        scale = square / side
        left, top = (square - width) // 2, (square - height) // 2
        geometry = Geometry(width, height, scale, scale, -left, -top)
        tiles = [square_grid(geometry, side // patch, side // patch, patch)]
    aspect = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    return _packed(model, tiles, width, height, aspect)


def _sides(model: Any, processor: Any) -> tuple[int, int]:
    """Pixels of a tile's side and of a patch's, which model and processor must agree on."""
    settings, vision = processor.image_processor, model.config.vision_config
    sizes = [settings.size, settings.crop_size] if settings.do_center_crop else [settings.size]
    edges = {edge for size in sizes for edge in dict(size).values() if edge}
    pinpoints = [list(each) for each in model.config.image_grid_pinpoints]
    if edges != {vision.image_size} or pinpoints != [list(each) for each in settings.image_grid_pinpoints]:
        raise ModelError(
            f"The processor cuts tiles of {sorted(edges)} pixels, the model takes {vision.image_size}, "
            "or their grids differ.",
            "Load model and processor from the same folder.",
        )
    return vision.image_size, vision.patch_size


def _whole(side: int, patch: int, width: int, height: int) -> Patches:
    geometry = Geometry(width, height, width / side, height / side)
    return square_grid(geometry, side // patch, side // patch, patch)


def _cut(processor: Any, side: int, patch: int, width: int, height: int) -> list[Patches]:
    """The tiles, row by row, of the image as it is fitted into the best of the allowed sizes."""
    from transformers import image_processing_utils

    library: Any = image_processing_utils
    allowed = processor.image_processor.image_grid_pinpoints
    best_h, best_w = library.select_best_resolution((height, width), allowed)
    new_h, new_w = library.get_patch_output_size(
        np.empty((3, height, width), bool), (best_h, best_w), "channels_first"
    )
    scale_x, scale_y = width / new_w, height / new_h
    left, top = (best_w - new_w) // 2, (best_h - new_h) // 2
    cells = side // patch
    return [
        square_grid(
            Geometry(width, height, scale_x, scale_y, (x - left) * scale_x, (y - top) * scale_y),
            cells,
            cells,
            patch,
        ).as_tile(1 + number)
        for number, (y, x) in enumerate(
            (y, x) for y in range(0, best_h, side) for x in range(0, best_w, side)
        )
    ]


def _packed(
    model: Any, tiles: list[Patches], width: int, height: int, settings: dict[str, Any]
) -> ImageLayout:
    whole = end_to_end(tiles)
    class_token = settings.get("vision_feature_select_strategy") == "default"
    encoder = end_to_end([tile.behind(1) for tile in tiles]) if class_token else whole
    numbers = torch.arange(len(whole), dtype=torch.float64).reshape(len(tiles), -1, 1)
    newline = torch.tensor([-1.0], dtype=torch.float64)
    packed, _ = model.model.pack_image_features(
        [numbers], torch.tensor([[height, width]]), image_newline=newline, **settings
    )
    order = packed[0][:, 0].numpy()
    if (order != order.round()).any():
        raise CaptureError(
            f"An image of {width} x {height} pixels is blurred into fewer tokens, whose patches mix.",
            "Scale the images of the dataset down; nothing of such an image is captured.",
        )
    return ImageLayout(_with_newlines(whole, order.astype(np.int64)), encoder)


def _with_newlines(patches: Patches, order: np.ndarray[Any, np.dtype[np.int64]]) -> Patches:
    """The patches in this order; -1 is a newline token, which has no place."""
    chosen = patches.take(order)
    newline = order < 0
    for values in (chosen.tile, chosen.row, chosen.col):
        values[newline] = -1
    chosen.box[newline] = np.nan
    return chosen
