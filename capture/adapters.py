"""What cannot be found out about a family from its modules and configuration, by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .adapter_blip import CAPTIONS, MATCHES, blip_answers, blip_prompts, blip_tables
from .adapter_mllama import mllama_tables
from .adapter_qformer import blip2_tables, instructblip_tables
from .labelled import Labelled, Tables
from .prompts import EncodedPrompts, Inputs


@dataclass(frozen=True)
class Adapter:
    """A family's peculiarities; as it is made without any, a family that has none.

    Attributes
    ----------
    roots
        The module that holds the layers, by stack, where the model does not tell.
    images
        The fewest and the most images of a sample.
    tables
        Makes the labels of tokens that are neither the decoder's nor an image encoder's.
    sequence
        The labels that change where one sequence of its encoders ends and the next begins.
    placeholders
        Whether image features take the place of the prompt's image tokens, which else only mark where an
        image is seen.
    computes
        The module whose dtype is the model's, where a part of it is kept in another.
    equal_images
        Whether images that pad a batch are attended to, so that its samples must have equally many.
    marks
        Whether a token of the prompt shows where an image is.
    prompts
        Makes of the processor's prompts what the decoder reads, where that is not the same.
    answers
        Writes the answers to those, in place of `generate_answers`.
    compares
        Whether it says how well a text fits an image, which then are the logits of options.
    """

    roots: Mapping[str, str] | None = None
    images: tuple[int, int | None] = (0, None)
    tables: Callable[[Any, Labelled], Tables] | None = None
    sequence: tuple[str, ...] = ("sample_index", "image_index", "tile")
    placeholders: bool = True
    computes: str | None = None
    equal_images: bool = False
    marks: bool = True
    prompts: Callable[[Any, EncodedPrompts], EncodedPrompts] | None = None
    answers: Callable[[Any, Any, Inputs, int], list[list[int]]] | None = None
    compares: bool = False


_QFORMER = {"text": "language_model", "vision": "vision_model", "qformer": "qformer"}

# By the `model_type` of the configuration, or by the class where a type has models of several kinds.
ADAPTERS: Mapping[str, Adapter] = {
    CAPTIONS: Adapter(
        roots={"text": "text_decoder", "vision": "vision_model"},
        images=(1, 1),
        tables=blip_tables,
        placeholders=False,
        marks=False,
        prompts=blip_prompts,
        answers=blip_answers,
    ),
    MATCHES: Adapter(
        roots={"text": "text_encoder", "vision": "vision_model"},
        images=(1, 1),
        tables=blip_tables,
        placeholders=False,
        marks=False,
        compares=True,
    ),
    "CLIPModel": Adapter(compares=True),
    "SiglipModel": Adapter(compares=True),
    "blip-2": Adapter(roots=_QFORMER, images=(1, 1), tables=blip2_tables, computes="language_model"),
    "instructblip": Adapter(
        roots=_QFORMER, images=(1, 1), tables=instructblip_tables, computes="language_model"
    ),
    "mllama": Adapter(
        roots={
            "text": "model.language_model",
            "vision": "model.vision_model.transformer",
            "vision_global": "model.vision_model.global_transformer",
        },
        images=(1, None),
        tables=mllama_tables,
        sequence=("sample_index", "image_index"),
        placeholders=False,
        equal_images=True,
    ),
}


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model's family, or one that says nothing."""
    of_type = ADAPTERS.get(getattr(getattr(model, "config", None), "model_type", ""), Adapter())
    return ADAPTERS.get(type(model).__name__, of_type)
