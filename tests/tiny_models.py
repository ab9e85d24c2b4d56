"""Tiny models of random weights, and datasets for them: small enough for every test, unequal on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.train_architecture import BEGIN, END, IMAGE, PAD, VOCABULARY, build_processor

SIDE, PATCH = 64, 8


@dataclass(frozen=True)
class Listed:
    """A dataset that is a list of samples."""

    samples: tuple[Sample, ...]
    name: str = "listed"

    def fingerprint(self) -> str:
        return hashlib.sha256(repr([sample.sample_id for sample in self.samples]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self.samples[index]


def llava(*, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any) -> LoadedModel:
    """A LLaVA with grouped key heads, every parameter random and large enough to matter."""
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=48,
    )
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, **text}
    decoder = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
        **settings,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = LlavaForConditionalGeneration(config)
    randomise(model, seed)
    model.generation_config.eos_token_id = END
    return LoadedModel(model.to(dtype).eval(), build_processor(), f"random-llava-{seed}")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values: some start at zero, and would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def samples(count: int, *, images: Sequence[int] = (1,)) -> tuple[Sample, ...]:
    """Questions of four different lengths; sample i has images[i % len(images)] images."""
    extra = ("", " and the blue ring", " and the blue ring and the red cross", " and")
    return tuple(
        Sample(
            sample_id=f"s{number:03d}",
            images=tuple(picture(10 * number + i) for i in range(images[number % len(images)])),
            question=f"where is the red square relative to the blue circle{extra[number % 4]} ?",
            options=("left", "right", "above", "below"),
            answer=("left", "right", "above", "below")[number % 4],
            relation=("left", "right", "above", "below")[number % 4],
            subject="red square",
            object="blue circle",
            group=f"g{number // 4}",
            extra={"number": number, "even": number % 2 == 0, "note": f"n{number}"},
        )
        for number in range(count)
    )
