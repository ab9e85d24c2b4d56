"""The image that a sample was asked about, as the run stores it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mechanistic.store import group
from mechanistic.store.errors import DataError, MissingSiteError

if TYPE_CHECKING:
    from PIL.Image import Image


def sample_image(run: xr.DataTree, sample: int, *, image: int = 0) -> Image:
    """One image of one sample, RGB, in its original size; reads its bytes alone.

    Raises
    ------
    MissingSiteError  the run was captured without images.
    DataError         the sample has no such image, or its bytes are no image.
    """
    import PIL.Image

    table = group(run, "images")[["sample_index", "image_index", "start", "length"]].compute()
    chosen = np.flatnonzero((table["sample_index"] == sample) & (table["image_index"] == image))
    if not chosen.size:
        raise DataError(
            f"sample {sample} has no image {image}.", "images/ lists the images: run['images'].to_dataset()."
        )
    start, length = int(table["start"][chosen[0]]), int(table["length"][chosen[0]])
    if start < 0:
        raise MissingSiteError(
            "this run holds no image bytes: it was captured with --no-images.",
            "Capture again without it, or open the image from its dataset.",
        )
    data = group(run, "image_bytes")["data"][start : start + length].values.tobytes()
    try:
        return PIL.Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as cause:
        raise DataError(
            f"image {image} of sample {sample} cannot be decoded ({cause}).",
            "`mechanistic verify` tells whether the run is damaged.",
        ) from cause
