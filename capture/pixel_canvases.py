"""The pixels that a model reads, as pictures again: one canvas an image, or a tile of one.

Processors hand them over stacked, padded to the same number of tiles, or cut into the encoder's patches
(Qwen); a canvas is always (channel, y, x), and its patches are where the encoder's token table says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError

from .coordinates_square import vision_config
from .targeted_sample import TargetedSample

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Canvases:
    """How `pixel_values` of one sample is made of canvases; `places` are their images and tiles."""

    shape: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    patch: int
    # Of Qwen's: rows and columns of patches of each image, the side of a merge block, frames of a patch.
    grids: tuple[tuple[int, int], ...] = ()
    merge: int = 1
    frames: int = 1

    def split(self, values: Tensor) -> list[Array]:
        """The canvases in `pixel_values`; where a patch holds several frames, their sum."""
        rows = values.detach().float().cpu().numpy()
        if not self.grids:
            return [rows[index] for index in self._indices()]
        found, start = [], 0
        for height, width in self.grids:
            count = height * width
            found.append(self._picture(rows[start : start + count], height, width))
            start += count
        return found

    def replaced(self, values: Tensor, change: Callable[[Array], Array]) -> Tensor:
        """`pixel_values` with every canvas changed, in float32; padding stays as it is."""
        new = values.detach().float().cpu().numpy().copy()
        if not self.grids:
            for index in self._indices():
                new[index] = change(new[index])
        else:
            changed = [change(canvas / np.float32(self.frames)) for canvas in self.split(values)]
            cut = [self._rows(canvas, *grid) for canvas, grid in zip(changed, self.grids, strict=True)]
            new = np.concatenate(cut)
        return torch.from_numpy(new).to(values.device)

    def patch_sums(self, maps: Sequence[Array], patches: dict[str, NDArray[Any]]) -> Array:
        """Sums of maps (y, x) over each patch of the encoder's token table; 0 for a token that is none."""
        sums = np.zeros(len(patches["position"]), np.float32)
        for place, values in zip(self.places, maps, strict=True):
            rows, columns = (size // self.patch for size in values.shape)
            cut = values[: rows * self.patch, : columns * self.patch]
            cells = cut.reshape(rows, self.patch, columns, self.patch).sum((1, 3), dtype=np.float64)
            here = _tokens_of(place, patches) & (patches["patch_row"] >= 0)
            sums[here] = cells[patches["patch_row"][here], patches["patch_col"][here]]
        return sums

    def _indices(self) -> list[tuple[int, ...]]:
        if len(self.shape) == 4:
            return [(number,) for number in range(len(self.places))]
        images = [image for image, _ in self.places]
        nested: list[tuple[int, ...]] = [
            (image, images[:number].count(image)) for number, image in enumerate(images)
        ]
        if len(self.shape) == 6:
            return [(0, *place) for place in nested]
        return [(0, number) for number in range(len(self.places))] if self.shape[0] == 1 else nested

    def _picture(self, rows: Array, height: int, width: int) -> Array:
        m, p = self.merge, self.patch
        blocks = rows.reshape(height // m, width // m, m, m, -1, self.frames, p, p)
        picture = blocks.transpose(5, 4, 0, 2, 6, 1, 3, 7).reshape(self.frames, -1, height * p, width * p)
        return np.asarray(picture.sum(0))

    def _rows(self, canvas: Array, height: int, width: int) -> Array:
        m, p, channels = self.merge, self.patch, canvas.shape[0]
        blocks = canvas.reshape(channels, height // m, m, p, width // m, m, p)
        rows = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        return np.repeat(rows, self.frames, axis=5).reshape(height * width, -1)


def canvases_of(asked: TargetedSample) -> Canvases:
    """The canvases of a sample.

    Raises
    ------
    CaptureError    the sample has no image, or its pixels do not have the form that its labels say.
    """
    values = asked.inputs.get("pixel_values")
    if values is None:
        raise CaptureError(
            "The sample has no image, so there are no pixels to attribute to.",
            "Give an image, or choose to='token_embeddings'.",
        )
    table = asked.patches
    pairs = zip(table["image_index"].tolist(), table["tile"].tolist(), strict=True)
    places = tuple(dict.fromkeys(pair for pair in pairs if min(pair) >= 0))
    patch = _side(vision_config(asked.loaded.model).patch_size)
    if "image_grid_thw" in asked.inputs:
        vision = vision_config(asked.loaded.model)
        grids = tuple((int(h), int(w)) for _, h, w in asked.inputs["image_grid_thw"].tolist())
        found = Canvases(
            tuple(values.shape), places, patch, grids, vision.spatial_merge_size, vision.temporal_patch_size
        )
        fits = len(grids) == len(places) and sum(h * w for h, w in grids) == len(values)
    else:
        found = Canvases(tuple(values.shape), places, patch)
        held = int(np.prod(values.shape[:-3]))
        fits = values.ndim in (4, 5, 6) and len(places) <= held and values.shape[-3] == 3
    if not fits:
        raise CaptureError(
            f"The model reads pixels of the shape {tuple(values.shape)} for {len(places)} images or tiles.",
            "This processor needs an adapter; until it has one, choose to='image_embeddings'.",
        )
    return found


def _tokens_of(place: tuple[int, int], patches: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    return np.asarray((patches["image_index"] == place[0]) & (patches["tile"] == place[1]))


def _side(patch: Any) -> int:
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) != 1:
        raise ModelError(
            f"Patches of {patch} pixels are not square.", "Choose to='image_embeddings' for this model."
        )
    return int(sides.pop())
