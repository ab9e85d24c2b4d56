"""A batch: samples read, prompted, answered and labelled, ready for the one forward that is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError, MechanisticError, ModelError

from .adapters import adapter_of
from .answers import generate_answers, pad_id
from .coordinates import image_layout
from .dataset import LoadedImage, Sample, load_image
from .failures import SampleError, naming
from .labelled import Labelled, Tables
from .mask_rules import SequenceLayout
from .memory import out_of_memory
from .models import LoadedModel
from .patches import ImageLayout
from .prompts import EncodedPrompts, Inputs, Prompt, append_tokens, build_prompt, encode_prompts
from .token_table import Columns, TokenTexts, decoder_table, encoder_table, no_words, sequence_layout

# PaliGemma's prompt is a prefix, open to itself; type 1 makes the answer causal, as it was when generated.
ANSWER_TYPE = {"paligemma": 1}


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a dataset; lists have one entry a sample.

    `further` has the labels of tokens that are neither the decoder's nor the image encoder's.
    """

    start: int
    samples: list[Sample]
    images: list[list[LoadedImage]]
    prompts: list[Prompt]
    inputs: Inputs
    answers: list[list[int]]
    decoder: list[Columns]
    encoder: list[Columns]
    last_prompt: NDArray[np.int64]
    further: Tables = field(default_factory=dict)

    def table(self, name: str) -> list[Columns]:
        """The labels of each sample's tokens: of ``text``, ``vision``, ``qformer``, ``xq`` or ``xk``."""
        if name in self.further:
            return self.further[name]
        return {"text": self.decoder, "vision": self.encoder}[name]

    @property
    def sequences(self) -> list[SequenceLayout]:
        """What the decoder's mask of each sample may depend on."""
        return self.layouts("text")

    def layouts(self, stack: str) -> list[SequenceLayout]:
        """What the mask of each sample may depend on, in a stack whose sequences are samples."""
        return [sequence_layout(columns) for columns in self.table(stack)]

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
    SampleError    of one sample: an image is missing or broken, the processor rejects it, or its labels
                     cannot be established.
    CaptureError     the processor takes each sample, but not together.
    ModelError       answers are wanted of a model that writes none.
    """
    if max_new_tokens and not loaded.model.can_generate():
        raise ModelError(
            f"{type(loaded.model).__name__} does not write text, so it gives no answers.",
            "Capture it without: --max-new-tokens 0, or max_new_tokens=0.",
        )
    if "text" not in loaded.anatomy.stacks:
        return _images_alone(loaded, samples, start)
    asked = ask(loaded, samples)
    check_positions(loaded, samples, asked.encoded, max_new_tokens)
    if generate:
        write = adapter_of(loaded.model).answers or generate_answers
        answers = write(loaded.model, loaded.tokenizer, asked.encoded.inputs, max_new_tokens)
        _check_answers(loaded, samples, answers)
    else:
        answers = [[0] * max_new_tokens for _ in samples]
    return answered(loaded, asked, start, answers, texts)


def _check_answers(loaded: LoadedModel, samples: Sequence[Sample], answers: Sequence[Sequence[int]]) -> None:
    for row, answer in enumerate(answers):
        if loaded.anatomy.image_token_id in answer:
            with naming(row):
                raise CaptureError(
                    f"The answer to sample '{samples[row].sample_id}' holds the token that marks an image.",
                    "The model cannot read it again; --max-new-tokens 0 captures the prompt alone.",
                )


@dataclass(frozen=True)
class Asked:
    """Samples with their images read and laid out, and their prompts encoded."""

    samples: list[Sample]
    images: list[list[LoadedImage]]
    layouts: list[list[ImageLayout]]
    prompts: list[Prompt]
    encoded: EncodedPrompts

    def table(
        self, loaded: LoadedModel, row: int, at: int, answer: Sequence[int], texts: TokenTexts
    ) -> Columns:
        """The labels of one sample's prompt and answer."""
        ids, offsets = self.encoded.ids(row), self.encoded.offsets[row]
        image = loaded.anatomy.image_token_id
        with naming(row):
            return decoder_table(
                self.samples[row],
                at,
                ids,
                answer,
                offsets,
                self.layouts[row],
                image,
                texts,
                replaced=adapter_of(loaded.model).placeholders,
            )


def ask(loaded: LoadedModel, samples: Sequence[Sample]) -> Asked:
    """Read, prompt and encode samples of a model that reads words. Raises like `prepare_batch`."""
    images, layouts, prompts = [], [], []
    for row, sample in enumerate(samples):
        with naming(row):
            _check_images(loaded, sample)
            images.append(read_images(sample))
            layouts.append(_layouts(loaded, images[row]))
            prompts.append(build_prompt(loaded.processor, sample))
    if adapter_of(loaded.model).equal_images and len({len(each) for each in images}) > 1:
        raise CaptureError(
            "Samples with different numbers of images share a batch, and this model would attend to padding.",
            "Capture them one at a time: --batch-size 1.",
        )
    encoded, read = _encode(loaded, samples, prompts, images), adapter_of(loaded.model).prompts
    if read is not None:
        encoded = read(loaded, encoded)
    return Asked(list(samples), images, layouts, prompts, encoded)


def answered(
    loaded: LoadedModel, asked: Asked, start: int, answers: list[list[int]], texts: TokenTexts
) -> Batch:
    """The batch of samples and their answers. SampleError where labels cannot be established."""
    rows = range(len(asked.samples))
    decoder = [asked.table(loaded, row, start + row, answers[row], texts) for row in rows]
    encoder = [encoder_table(start + row, asked.layouts[row]) for row in rows]
    tables = adapter_of(loaded.model).tables
    labelled = Labelled(asked.samples, asked.prompts, asked.encoded.inputs, decoder, encoder)
    return Batch(
        start=start,
        samples=asked.samples,
        images=asked.images,
        prompts=asked.prompts,
        inputs=append_tokens(
            asked.encoded.inputs,
            asked.encoded.lengths,
            answers,
            pad_id(loaded.tokenizer),
            answer_type=ANSWER_TYPE.get(loaded.model.config.model_type),
        ),
        answers=answers,
        decoder=decoder,
        encoder=encoder,
        last_prompt=asked.encoded.lengths - 1,
        further={} if tables is None else tables(loaded, labelled),
    )


def _check_images(loaded: LoadedModel, sample: Sample) -> None:
    fewest, most = adapter_of(loaded.model).images
    count = len(sample.images)
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more"
        raise CaptureError(
            f"Sample {sample.sample_id!r} has {count} images; {type(loaded.model).__name__} reads {wanted}.",
            "Leave the sample out, or give it as many images as the model reads.",
        )


def _images_alone(loaded: LoadedModel, samples: Sequence[Sample], start: int) -> Batch:
    """The batch of a model that reads no words: no prompt and no token of one."""
    images, layouts = [], []
    for row, sample in enumerate(samples):
        with naming(row):
            if not sample.images:
                raise CaptureError(
                    f"Sample {sample.sample_id!r} has no image, and this model reads nothing else.",
                    "Leave the sample out.",
                )
            images.append(read_images(sample))
            layouts.append(_layouts(loaded, images[row]))
    pixels = [image.pixels for each in images for image in each]
    encoded = loaded.processor(images=pixels, return_tensors="pt")
    return Batch(
        start=start,
        samples=list(samples),
        images=images,
        prompts=[Prompt("", (0, 0)) for _ in samples],
        inputs={"pixel_values": encoded["pixel_values"]},
        answers=[[] for _ in samples],
        decoder=[no_words(start + row) for row in range(len(samples))],
        encoder=[encoder_table(start + row, each) for row, each in enumerate(layouts)],
        last_prompt=np.zeros(len(samples), np.int64),
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
    except ModelError:
        raise
    except Exception as together:
        if out_of_memory(together):
            raise
        # One of them is at fault: alone, it fails again and can be named.
        for row, (sample, prompt, own) in enumerate(zip(samples, prompts, pixels, strict=True)):
            try:
                encode_prompts(loaded.processor, [prompt], [own])
            except MechanisticError as alone:
                error = CaptureError(f"Sample {sample.sample_id!r}: {_lowered(alone.what)}", alone.hint)
                raise SampleError(row, error) from alone
            except Exception as alone:
                error = CaptureError(
                    f"Sample {sample.sample_id!r}: the processor rejects it: {_reason(alone)}",
                    "Correct its image or question, or leave the sample out.",
                )
                raise SampleError(row, error) from alone
        if isinstance(together, MechanisticError):
            raise
        raise CaptureError(
            f"Samples {samples[0].sample_id!r} to {samples[-1].sample_id!r}: the processor takes each, "
            f"but not together: {_reason(together)}",
            "Capture them one at a time: --batch-size 1.",
        ) from together


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def check_positions(
    loaded: LoadedModel, samples: Sequence[Sample], encoded: EncodedPrompts, answer: int
) -> None:
    """SampleError for the first sample that has more tokens than the model has learned positions."""
    most = loaded.anatomy.positions
    for row, (sample, length) in enumerate(zip(samples, encoded.lengths.tolist(), strict=True)):
        if most is not None and length + answer > most:
            along = f" and up to {answer} of its answer" if answer else ""
            error = CaptureError(
                f"Sample {sample.sample_id!r}: its prompt has {length} tokens{along}; "
                f"this model reads {most}.",
                "Shorten the question, or leave the sample out.",
            )
            raise SampleError(row, error)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
