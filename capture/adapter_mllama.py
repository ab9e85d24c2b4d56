"""Mllama (Llama 3.2 Vision): some decoder layers read the image by cross-attention and nothing else.

Its encoders see all tiles of an image as one sequence, each tile with a class token ahead and padding behind,
then empty tiles. Padding and empty tiles belong to no tile. They are attended to, though not by each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mechanistic.store.errors import ModelError

from .labelled import Labelled, Tables, with_first_query
from .patches import Geometry, ImageLayout, Patches, end_to_end, placeless, square_grid


def mllama_layout(model: Any, processor: Any, width: int, height: int, images: int) -> ImageLayout:
    """The image is fitted into the upper left corner of a canvas of tiles."""
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_image_size_fit_to_canvas,
        get_optimal_tiled_canvas,
    )

    settings, vision = processor.image_processor, model.config.vision_config
    side, tiles = settings.size["height"], settings.max_image_tiles
    if (side, tiles) != (vision.image_size, vision.max_num_tiles):
        raise ModelError(
            f"The processor cuts {tiles} tiles of {side} pixels, the model takes {vision.max_num_tiles} of "
            f"{vision.image_size}.",
            "Load model and processor from the same folder.",
        )
    canvas_h, canvas_w = map(int, get_optimal_tiled_canvas(height, width, tiles, side))
    new_h, new_w = map(int, get_image_size_fit_to_canvas(height, width, canvas_h, canvas_w, side))
    scale_x, scale_y = width / new_w, height / new_h
    real, padded = _tile_tokens(vision)
    parts: list[Patches] = []
    corners = [(top, left) for top in range(0, canvas_h, side) for left in range(0, canvas_w, side)]
    for number, (top, left) in enumerate(corners):
        geometry = Geometry(width, height, scale_x, scale_y, left * scale_x, top * scale_y)
        cells = side // vision.patch_size
        grid = square_grid(geometry, cells, cells, vision.patch_size).as_tile(number)
        parts += [grid.behind(1), placeless(padded - real)]
    parts.append(placeless((tiles - len(corners)) * padded))
    return ImageLayout(placeless(1), end_to_end(parts))


def mllama_tables(loaded: Any, batch: Labelled) -> Tables:
    """Keys are the encoder's tokens but for the padding of tiles; a word reads the images that are before it.

    A word before the first image reads every key, empty tiles too: the model's own mask leaves it open.
    """
    real, padded = _tile_tokens(loaded.model.config.vision_config)
    keys = []
    for words, seen in zip(batch.decoder, batch.encoder, strict=True):
        kept = np.arange(len(seen["position"])) % padded < real
        columns = {name: values[kept] for name, values in seen.items()}
        marks = np.flatnonzero(words["image_index"] >= 0)
        first = np.where(columns["tile"] >= 0, words["position"][marks][columns["image_index"]], -1)
        keys.append(with_first_query(columns, first))
    return {"xq": list(batch.decoder), "xk": keys}


def _tile_tokens(vision: Any) -> tuple[int, int]:
    """Tokens of a tile, without and with padding to a multiple of 8."""
    real = (vision.image_size // vision.patch_size) ** 2 + 1
    return real, real + (8 - real % 8) % 8
