"""A batch: samples read, prompted, answered and labelled, ready for the one forward that is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError, MechanisticError

from .answers import generate_answers, pad_id
from .coordinates import image_layout
from .dataset import LoadedImage, Sample, load_image
from .mask_rules import SequenceLayout
from .models import LoadedModel
from .patches import ImageLayout
from .prompts import EncodedPrompts, Inputs, Prompt, append_tokens, build_prompt, encode_prompts
from .token_table import Columns, TokenTexts, decoder_table, encoder_table, sequence_layout


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a dataset; lists have one entry a sample."""

    start: int
    samples: list[Sample]
    images: list[list[LoadedImage]]
    prompts: list[Prompt]
    inputs: Inputs
    answers: list[list[int]]
    decoder: list[Columns]
    encoder: list[Columns]
    last_prompt: NDArray[np.int64]

    @property
    def sequences(self) -> list[SequenceLayout]:
        """What the decoder's mask of each sample may depend on."""
        return [sequence_layout(columns) for columns in self.decoder]

    @property
    def tokens(self) -> int:
        """Decoder tokens of all samples, without padding."""
        return sum(len(columns["position"]) for columns in self.decoder)


def read_images(sample: Sample) -> list[LoadedImage]:
    """Decode the images of a sample (ImageError names it if one cannot be)."""
    return [load_image(source, sample_id=sample.sample_id) for source in sample.images]


def prepare_batch(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    start: int,
    *,
    max_new_tokens: int,
    texts: TokenTexts,
    generate: bool = True,
) -> Batch:
    """Prompt, encode, generate and label; the model runs without capture here.

    With `generate=False` it does not run at all, and every answer has the full length.

    Raises
    ------
    ImageError      an image is missing or broken.
    CaptureError    the processor rejects a sample, or labels cannot be established.
    """
    images = [read_images(sample) for sample in samples]
    prompts = [build_prompt(loaded.processor, sample) for sample in samples]
    encoded = _encode(loaded, samples, prompts, images)
    if generate:
        answers = generate_answers(loaded.model, loaded.tokenizer, encoded.inputs, max_new_tokens)
    else:
        answers = [[0] * max_new_tokens for _ in samples]
    layouts = [_layouts(loaded, each) for each in images]
    decoder = [
        decoder_table(
            sample,
            start + row,
            encoded.ids(row),
            answers[row],
            encoded.offsets[row],
            layouts[row],
            loaded.anatomy.image_token_id,
            texts,
        )
        for row, sample in enumerate(samples)
    ]
    return Batch(
        start=start,
        samples=list(samples),
        images=images,
        prompts=prompts,
        inputs=append_tokens(encoded.inputs, encoded.lengths, answers, pad_id(loaded.tokenizer)),
        answers=answers,
        decoder=decoder,
        encoder=[encoder_table(start + row, each) for row, each in enumerate(layouts)],
        last_prompt=encoded.lengths - 1,
    )


def _layouts(loaded: LoadedModel, images: Sequence[LoadedImage]) -> list[ImageLayout]:
    return [
        image_layout(loaded.model, loaded.processor, image.width, image.height, images=len(images))
        for image in images
    ]


def _encode(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[LoadedImage]],
) -> EncodedPrompts:
    pixels = [[image.pixels for image in each] for each in images]
    try:
        return encode_prompts(loaded.processor, prompts, pixels)
    except MechanisticError:
        raise
    except Exception as together:
        # One of them is at fault: alone, it fails again and can be named.
        for sample, prompt, own in zip(samples, prompts, pixels, strict=True):
            try:
                encode_prompts(loaded.processor, [prompt], [own])
            except Exception as alone:
                raise CaptureError(
                    f"Sample {sample.sample_id!r}: the processor rejects it: {_reason(alone)}",
                    "Correct its image or question, or leave the sample out.",
                ) from alone
        raise CaptureError(
            f"Samples {samples[0].sample_id!r} to {samples[-1].sample_id!r}: the processor takes each, "
            f"but not together: {_reason(together)}",
            "Capture them one at a time: --batch-size 1.",
        ) from together


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
