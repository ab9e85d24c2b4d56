"""Ways to spoil what a question rests on: noise on embeddings, or an image blurred, averaged or noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from mechanistic.store.errors import DataError, SpecificationError

from .dataset import Sample, encode_png, open_image

ImageCorruption = Literal["blur", "mean", "noise"]


def embedding_noise(
    where: NDArray[np.bool_], width: int, *, scale: float, copies: int, seed: int, start: int, level: int = 0
) -> Tensor:
    """Gaussian noise (copy * sample, token, `width`) of standard deviation `scale` on the tokens `where`.

    What a sample gets depends on the seed, its number and the copy alone, so not on how samples are batched.

    Parameters
    ----------
    where
        (sample, token): which tokens are spoiled; the others get 0.
    start
        Number of the first sample.
    level
        Which embeddings, where a model has those of higher layers too: each gets other noise.
    """
    noise = np.zeros((copies, *where.shape, width), np.float32)
    for row, tokens in enumerate(where):
        for copy in range(copies):
            rng = np.random.default_rng([seed, start + row, copy, *([level] if level else [])])
            noise[copy, row, tokens] = scale * rng.standard_normal((int(tokens.sum()), width))
    return torch.from_numpy(noise.reshape(-1, *noise.shape[2:]))


def corrupt_image(
    sample: Sample, corruption: ImageCorruption, *, strength: float | None = None, seed: int = 0
) -> Sample:
    """The sample with each of its images spoiled; everything else of it stays.

    Parameters
    ----------
    corruption
        ``"blur"``: Gaussian, of a radius that is `strength` times the shorter side (0.125 by default);
        ``"mean"``: every pixel is the image's mean colour; ``"noise"``: Gaussian noise of `strength` (3 by
        default) standard deviations of the image's own pixels is added, and cut at black and white.

    Raises
    ------
    SpecificationError    an unknown corruption, or a strength that is not above 0.
    DataError             the sample has no image.
    """
    if corruption not in get_args(ImageCorruption):
        raise SpecificationError(
            f"There is no corruption '{corruption}' of an image.",
            f"There are {', '.join(get_args(ImageCorruption))}; swaps are minimal pairs of the dataset.",
        )
    if strength is not None and not strength > 0:
        raise SpecificationError(f"The strength of the corruption is {strength}.", "Give one above 0.")
    if not sample.images:
        raise DataError(
            f"Sample {sample.sample_id!r} has no image to corrupt.", "Corrupt its words: corrupt='subject'."
        )
    images = [open_image(source, sample_id=sample.sample_id) for source in sample.images]
    rng = np.random.default_rng(seed)
    spoiled = tuple(encode_png(_spoil(image, corruption, strength, rng)) for image in images)
    return replace(sample, images=spoiled)


def corrupt_images(
    samples: Sequence[Sample],
    corruption: ImageCorruption,
    *,
    strength: float | None = None,
    seed: int = 0,
) -> tuple[Sample, ...]:
    """`corrupt_image` of each sample, each with a seed of its own. Raises like it."""
    return tuple(
        corrupt_image(sample, corruption, strength=strength, seed=seed + number)
        for number, sample in enumerate(samples)
    )


def _spoil(
    image: Image.Image, corruption: ImageCorruption, strength: float | None, rng: np.random.Generator
) -> Image.Image:
    if corruption == "blur":
        share = 0.125 if strength is None else strength
        return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))
    pixels = np.asarray(image, np.float64)
    if corruption == "mean":
        pixels = np.broadcast_to(pixels.mean((0, 1)), pixels.shape)
    else:
        deviation = (3.0 if strength is None else strength) * pixels.std()
        pixels = pixels + deviation * rng.standard_normal(pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
