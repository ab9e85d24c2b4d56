"""The zoo: a tiny model of every family, made from its configuration, every parameter random.

Each comes with what an outsider knows of it: where its layers are, which masks it uses. Nothing here is taken
from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tiny_models import picture
from zoo_encoders import bert, gemma2, gpt2, gpt_oss, sees_only, text_only, two_towers_clip, two_towers_siglip
from zoo_parts import HUB, TEXT
from zoo_queried import blip, blip_matching, mllama, queried
from zoo_vision_language import gemma3, gemma3_cropping, idefics3, internvl, llava, onevision, paligemma, qwen

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel


@dataclass(frozen=True)
class Family:
    """`layers` names the list of layers of each stack, `masks` the rules that its layers follow.

    `text` is what its tokenizer must be told besides. `halves` names, by stack, or by stack and layer, the
    children of a layer whose outputs are its two halves and the one that reads what is between; None where
    there is no such thing. `cross` names the layers of a stack that attend to another's tokens, `own` those
    that attend to their own, if not all do. `most` is how many images a sample has at most. The image tokens
    of a `placeless` family have no place in the image. `unread` is how many tokens at the end of a prompt
    `generate` leaves out. `states` is the module that tells the hidden states of its text, if not the model.
    """

    build: Callable[[], LoadedModel]
    layers: Mapping[str, str]
    masks: Mapping[str, Sequence[str]]
    sizes: Sequence[tuple[int, int]] = ((32, 32), (50, 30), (30, 70))
    text: Mapping[str, Any] = field(default_factory=dict)
    halves: Mapping[Any, tuple[str, str, str] | None] = field(default_factory=dict)
    cross: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    own: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    most: int = 2
    placeless: bool = False
    unread: int = 0
    states: str = ""

    def halves_of(self, stack: str, layer: int | None = None) -> tuple[str, str, str] | None:
        """Those of `halves`, or the commonest."""
        return self.halves.get((stack, layer), self.halves.get(stack, ("self_attn", "mlp", "")))

    @property
    def sees(self) -> bool:
        """Whether it has an image encoder."""
        return "vision" in self.layers


def samples(family: Family, count: int = 4) -> tuple[Sample, ...]:
    """Questions of different lengths, at most six; with images of different sizes, one or two a question."""
    ring, cross = " and the blue ring", " and the red cross"
    extra = ("", ring, " and", ring + cross, " red", " and the cross")
    sizes = family.sizes

    def images(number: int) -> tuple[Image.Image, ...]:
        many = min(1 + number % 2, family.most) if family.sees else 0
        # The last of six begins with the image of the first.
        first = number % 5
        return tuple(picture(10 * first + i, *sizes[(first + i) % len(sizes)]) for i in range(many))

    return tuple(
        Sample(
            sample_id=f"s{number}",
            images=images(number),
            question=f"where is the red square relative to the blue circle{extra[number]} ?",
            options=("left", "right"),
            answer="left",
            relation="left",
            subject="red square",
            object="blue circle",
        )
        for number in range(count)
    )


def _queried(name: str, decoder: str, mlp: str) -> Family:
    return Family(
        lambda: queried(name),
        {
            "text": f"language_model.model.{decoder}",
            "vision": "vision_model.encoder.layers",
            "qformer": "qformer.encoder.layer",
        },
        {"text": ["causal"], "qformer": ["bidirectional"], "vision": ["per_image"]},
        halves={"text": ("self_attn", mlp, ""), "qformer": None},
        cross={"qformer": (0, 2)},
        most=1,
        placeless=True,
    )


TOWERS = {"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"}
TOWER = {"text": "model.language_model.layers", "vision": "model.vision_tower.encoder.layers"}
ATTN_MLP = ("attn", "mlp", "")
NORMED = {"text": ("post_attention_layernorm", "post_feedforward_layernorm", "")}
QWEN = {"text": "model.language_model.layers", "vision": "model.visual.blocks"}
ZOO: dict[str, Family] = {
    "llama": Family(
        lambda: text_only(HUB.LlamaForCausalLM(HUB.LlamaConfig(**TEXT))),
        {"text": "model.layers"},
        {"text": ["causal"]},
    ),
    "qwen2": Family(
        lambda: text_only(HUB.Qwen2ForCausalLM(HUB.Qwen2Config(**TEXT))),
        {"text": "model.layers"},
        {"text": ["causal"]},
    ),
    "gemma2": Family(
        gemma2,
        {"text": "model.layers"},
        {"text": ["sliding_window", "causal", "sliding_window"]},
        halves=NORMED,
    ),
    "gpt_oss": Family(gpt_oss, {"text": "model.layers"}, {"text": ["sliding_window", "causal"]}),
    "gpt2": Family(gpt2, {"text": "transformer.h"}, {"text": ["causal"]}, halves={"text": ATTN_MLP}),
    "qwen2_vl": Family(
        lambda: qwen("Qwen2VL"),
        QWEN,
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"vision": ATTN_MLP},
    ),
    "qwen2_5_vl": Family(
        lambda: qwen("Qwen2_5_VL"),
        QWEN,
        {"text": ["causal"], "vision": ["image_windows", "per_image"]},
        halves={"vision": ATTN_MLP},
    ),
    "qwen3_vl": Family(
        lambda: qwen("Qwen3VL"),
        QWEN,
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"vision": ATTN_MLP},
    ),
    "gemma3": Family(
        gemma3,
        TOWER,
        {"text": ["sliding_window_image_blocks", "causal_image_blocks"], "vision": ["per_image"]},
        halves=NORMED,
    ),
    "gemma3_cropping": Family(
        gemma3_cropping,
        TOWER,
        {"text": ["sliding_window_image_blocks", "causal_image_blocks"], "vision": ["per_image"]},
        sizes=((32, 32), (50, 30), (30, 100)),
        halves=NORMED,
    ),
    "paligemma": Family(paligemma, TOWER, {"text": ["prefix"], "vision": ["per_image"]}),
    "llava": Family(lambda: llava("Llava"), TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "llava_next": Family(lambda: llava("LlavaNext"), TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "llava_onevision": Family(onevision, TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "internvl": Family(
        internvl,
        {**TOWER, "vision": "model.vision_tower.encoder.layer"},
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"vision": ("attention", "mlp", "layernorm_after")},
    ),
    "idefics3": Family(
        lambda: idefics3("Idefics3"),
        {"text": "model.text_model.layers", "vision": "model.vision_model.encoder.layers"},
        {"text": ["causal"], "vision": ["per_image"]},
    ),
    "smolvlm": Family(
        lambda: idefics3("SmolVLM"),
        {"text": "model.text_model.layers", "vision": "model.vision_model.encoder.layers"},
        {"text": ["causal"], "vision": ["per_image"]},
    ),
    "blip": Family(
        blip,
        {"text": "text_decoder.bert.encoder.layer", "vision": "vision_model.encoder.layers"},
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"text": None},
        cross={"text": (0, 1)},
        most=1,
        unread=1,
    ),
    "blip_matching": Family(
        blip_matching,
        {"text": "text_encoder.encoder.layer", "vision": "vision_model.encoder.layers"},
        {"text": ["bidirectional"], "vision": ["per_image"]},
        halves={"text": None},
        cross={"text": (0, 1)},
        most=1,
        states="text_encoder",
    ),
    "blip2": _queried("Blip2", "decoder.layers", "fc2"),
    "instructblip": _queried("InstructBlip", "layers", "mlp"),
    "mllama": Family(
        mllama,
        {
            "text": "model.language_model.layers",
            "vision": "model.vision_model.transformer.layers",
            "vision_global": "model.vision_model.global_transformer.layers",
        },
        {"text": ["causal"], "vision": ["padded_image"], "vision_global": ["padded_image"]},
        halves={
            ("text", 1): ("cross_attn", "mlp", "post_attention_layernorm"),
            "vision_global": ("self_attn", "mlp", "post_attention_layernorm"),
        },
        text={"add_special_tokens": False},
        cross={"text": (1,)},
        own={"text": (0, 2)},
    ),
    "bert": Family(bert, {"text": "bert.encoder.layer"}, {"text": ["bidirectional"]}, halves={"text": None}),
    "vit": Family(
        lambda: sees_only("ViT"),
        {"vision": "layers"},
        {"vision": ["per_image"]},
        halves={"vision": ("attention", "mlp", "")},
    ),
    "dinov2": Family(
        lambda: sees_only("Dinov2"),
        {"vision": "encoder.layer"},
        {"vision": ["per_image"]},
        halves={"vision": ("layer_scale1", "layer_scale2", "")},
    ),
    "clip": Family(two_towers_clip, TOWERS, {"text": ["causal"], "vision": ["per_image"]}),
    "siglip": Family(
        two_towers_siglip,
        TOWERS,
        {"text": ["bidirectional"], "vision": ["per_image"]},
        text={"padding": "max_length", "padding_side": "right"},
    ),
}
