"""Accuracy of a saved folder the way anyone would use it: processor, generate, decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from .dataset import Sample, open_image
from .shapes import Shapes
from .shapes_drawing import SIDE

BATCH = 50
# transformers annotates its calls only in part, so a strict check of them would say nothing.
_transformers: Any = transformers


@dataclass(frozen=True)
class Evaluation:
    """Shares of right answers, each over `samples` samples of Shapes; chance is 0.25."""

    samples: int
    two_objects: float
    distractor: float
    train_pairs: float
    blank_image: float
    shuffled_images: float


def evaluate(folder: Path, samples: int = 2000) -> Evaluation:
    """Ask the model in `folder` about held-out pairs, pairs that it was trained on, and wrong images."""
    held_out = list(Shapes(samples, seed=1, distractor=0))
    return Evaluation(
        samples=samples,
        two_objects=accuracy(folder, held_out),
        distractor=accuracy(folder, Shapes(samples, seed=1, distractor=1)),
        train_pairs=accuracy(folder, Shapes(samples, seed=1, distractor=0, split="train")),
        blank_image=accuracy(folder, blanked(held_out)),
        shuffled_images=accuracy(folder, shuffled(held_out)),
    )


def accuracy(folder: Path, samples: Iterable[Sample]) -> float:
    """Share of samples whose generated answer is the answer, word for word."""
    asked = list(samples)
    given = answers(folder, asked)
    return sum(text == sample.answer for text, sample in zip(given, asked, strict=True)) / len(asked)


def answers(folder: Path, samples: Sequence[Sample]) -> list[str]:
    """What the model generates for each sample, greedily, without special tokens."""
    processor = _transformers.AutoProcessor.from_pretrained(folder)
    llava = _transformers.LlavaForConditionalGeneration
    model = llava.from_pretrained(folder, dtype=torch.float32).eval()
    given: list[str] = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        inputs = processor(
            images=[open_image(sample.images[0], sample_id=sample.sample_id) for sample in batch],
            text=[_prompt(processor, sample.question) for sample in batch],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        given += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return given


def blanked(samples: Iterable[Sample]) -> list[Sample]:
    """The same questions about an empty grey image."""
    empty = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
    return [replace(sample, images=(empty,)) for sample in samples]


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """Each question about the image of a sample half the dataset away, which shows other objects."""
    away = len(samples) // 2 + 1
    return [
        replace(sample, images=samples[(i + away) % len(samples)].images) for i, sample in enumerate(samples)
    ]


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    text: str = processor.apply_chat_template([message], add_generation_prompt=True)
    return text
