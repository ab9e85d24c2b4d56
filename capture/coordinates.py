"""Which part of which image a token stands for: tile, row, column, and its box in the original image.

A family's layout says in which order its encoder and its decoder see the patches of one image; `Geometry`
takes pixels of what the processor made back to pixels of the original. Both are proven in the tests by
perturbing pixels and seeing which tokens move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import ModelError


@dataclass(frozen=True)
class Geometry:
    """Processed pixel (x, y) is original pixel (x * scale_x + offset_x, y * scale_y + offset_y)."""

    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0

    def boxes(self, processed: NDArray[np.float64]) -> NDArray[np.float32]:
        """Boxes (n, [x0, y0, x1, y1]) in the original image, cut at its edges; NaN for padding."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        offset = np.array([self.offset_x, self.offset_y] * 2)
        limit = np.array([self.width, self.height] * 2, float)
        boxes: NDArray[np.float64] = np.clip(processed * scale + offset, 0, limit)
        empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
        boxes[empty] = np.nan
        return np.asarray(boxes, np.float32)


@dataclass(frozen=True)
class Patches:
    """One row a token of one image; tokens that are no patch (a class token) have -1 and NaN."""

    tile: NDArray[np.int16]
    row: NDArray[np.int16]
    col: NDArray[np.int16]
    box: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)

    def behind(self, count: int) -> Patches:
        """The same patches behind `count` tokens that are none."""
        none = np.full(count, -1, np.int16)
        empty = np.full((count, 4), np.nan, np.float32)
        return Patches(
            np.concatenate([none, self.tile]),
            np.concatenate([none, self.row]),
            np.concatenate([none, self.col]),
            np.concatenate([empty, self.box]),
        )


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one image: the decoder's placeholders, and the encoder's own, in order."""

    decoder: Patches
    encoder: Patches


def image_layout(model: Any, processor: Any, width: int, height: int) -> ImageLayout:
    """The layout of an image of the given original size.

    Raises
    ------
    ModelError    nothing is known about how this family lays out its image tokens.
    """
    family = model.config.model_type
    if family not in _LAYOUTS:
        raise ModelError(
            f"Nothing is known about where the image tokens of '{family}' lie in the image.",
            f"Image coordinates are known for: {', '.join(sorted(_LAYOUTS))}.",
        )
    return _LAYOUTS[family](model, processor, width, height)


def square_grid(geometry: Geometry, rows: int, cols: int, patch: float) -> Patches:
    """Patches of `patch` x `patch` processed pixels, row by row, as tile 0."""
    row, col = (index.ravel() for index in np.indices((rows, cols)))
    corner = np.stack([col, row, col + 1, row + 1], axis=1).astype(np.float64) * patch
    return Patches(
        np.zeros(rows * cols, np.int16), row.astype(np.int16), col.astype(np.int16), geometry.boxes(corner)
    )


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


def _llava(model: Any, processor: Any, width: int, height: int) -> ImageLayout:
    geometry, out_w, out_h = resized_and_cropped(processor.image_processor, width, height)
    patch = model.config.vision_config.patch_size
    grid = square_grid(geometry, out_h // patch, out_w // patch, patch)
    # The tower's class token; the strategy "default" drops it before the decoder sees it.
    encoder = grid.behind(processor.num_additional_image_tokens)
    strategy = model.config.vision_feature_select_strategy
    return ImageLayout(grid if strategy == "default" else encoder, encoder)


_LAYOUTS: dict[str, Callable[[Any, Any, int, int], ImageLayout]] = {"llava": _llava}
