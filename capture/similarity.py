"""How well a text fits an image, by models that compare the two: CLIP and SigLIP, and BLIP that matches.

Such a model writes nothing. What it says of a question with options is how well each of them fits the image,
read as a caption by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .adapters import adapter_of
from .answers import to_device
from .batch import Batch, ask, check_positions
from .failures import SampleError

if TYPE_CHECKING:
    from .models import LoadedModel


def similarity(output: Any) -> Tensor | None:
    """The logit of a pair, of each text and the image at its place; None from a model that gives none.

    Of two towers it is their own; of BLIP the log-odds of a match, whose sigmoid is the probability that its
    head gives.

    Raises
    ------
    CaptureError    there are not as many images as texts.
    """
    match: Tensor | None = getattr(output, "itm_score", None)
    if match is not None:
        return match[:, 1] - match[:, 0]
    each: Tensor | None = getattr(output, "logits_per_image", None)
    if each is None:
        return None
    images, texts = each.shape
    if images != texts:
        raise CaptureError(f"The sample has {images} images for {texts} text.", "Give one image a sample.")
    return each.diagonal()


def option_similarities(loaded: LoadedModel, batch: Batch) -> list[list[float]] | None:
    """The similarity of each option of each sample to its image; none of a sample without just one image.

    None from a model that does not compare. One forward a sample, over its options.

    Raises
    ------
    SampleError    an option is longer than the model reads.
    """
    if not adapter_of(loaded.model).compares:
        return None
    return [_of_sample(loaded, batch, row) for row in range(len(batch.samples))]


def _of_sample(loaded: LoadedModel, batch: Batch, row: int) -> list[float]:
    sample, images = batch.samples[row], batch.images[row]
    if len(images) != 1 or not sample.options:
        return []
    asked = [replace(sample, question=option, images=tuple(images)) for option in sample.options]
    try:
        encoded = ask(loaded, asked).encoded
        check_positions(loaded, asked, encoded, 0)
    except SampleError as error:
        what = f"Option {sample.options[error.row]!r}, as a caption: {error.what[:1].lower()}{error.what[1:]}"
        raise SampleError(row, CaptureError(what, error.hint)) from error
    with torch.no_grad():
        found = similarity(loaded.model(**to_device(encoded.inputs, loaded.model)))
    assert found is not None
    return [float(value) for value in found.float().cpu()]
