"""The zoo: a tiny model of every family, made from its configuration, every parameter random.

Each comes with what an outsider knows of it: where its layers are, which masks it uses. Nothing here is taken
from the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from PIL import Image
from tiny_models import picture, randomise
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.train_architecture import BEGIN, END, PAD, WORDS

HUB: Any = transformers
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SPECIALS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
VOCABULARY = {word: number for number, word in enumerate([*WORDS, *SPECIALS, "\n", "\n\n"])}
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = {"vocab_size": len(VOCABULARY), "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
TEXT = {**WIDE, **IDS, "max_position_embeddings": 512, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Family:
    """`layers` names the list of layers of each stack, `masks` the rules that its layers follow."""

    build: Callable[[], LoadedModel]
    layers: Mapping[str, str]
    masks: Mapping[str, Sequence[str]]
    sizes: Sequence[tuple[int, int]] = ((32, 32), (50, 30), (30, 70))
    halves: Mapping[str, bool] = field(default_factory=dict)

    @property
    def sees(self) -> bool:
        """Whether it has an image encoder."""
        return "vision" in self.layers


def template(image: str) -> str:
    """A chat template that writes `image` for each image."""
    return (
        "{% for message in messages %}user {% if message['content'] is string %}{{ message['content'] }} "
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}assistant"
    )


def tokenizer(*, bos: bool = True, **special: str) -> Any:
    """One token a word; `special` names further special tokens, such as image_token."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return HUB.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special,
        padding_side="left",
    )


def grown(model: Any, processor: Any, name: str) -> LoadedModel:
    """The model with random parameters, ready to be captured."""
    randomise(model, 1)
    if model.can_generate():
        model.generation_config.eos_token_id = END
        model.generation_config.pad_token_id = PAD
    return LoadedModel(model.to(torch.float32).eval(), processor, name)


def samples(family: Family) -> tuple[Sample, ...]:
    """Four questions of different lengths; with images of different sizes, one or two a question."""
    extra = ("", " and the blue ring", " and", " and the blue ring and the red cross")
    sizes = family.sizes

    def images(number: int) -> tuple[Image.Image, ...]:
        count = (1 + number % 2) if family.sees else 0
        return tuple(picture(10 * number + i, *sizes[(number + i) % len(sizes)]) for i in range(count))

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
        for number in range(4)
    )


def _text(model: Any) -> LoadedModel:
    return grown(model, tokenizer(), model.config.model_type)


def _gemma2() -> LoadedModel:
    config = HUB.Gemma2Config(
        **{**TEXT, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )
    return _text(HUB.Gemma2ForCausalLM(config))


def _gpt2() -> LoadedModel:
    config = HUB.GPT2Config(n_embd=32, n_layer=2, n_head=4, **IDS)
    return _text(HUB.GPT2LMHeadModel(config))


def processor_of(base: Any, *parts: Any, **settings: Any) -> Any:
    """A processor without its video half, which needs torchvision."""

    class Without(base):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return Without(*parts, **settings)


def _qwen(name: str, vision: Mapping[str, Any]) -> LoadedModel:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer(bos=False, image_token="<|image_pad|>", video_token="<|video_pad|>")
    ids = {
        f"{what}_token_id": VOCABULARY[f"<|{token}|>"]
        for what, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    section = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    rope = {"rope_parameters": {**section, "mrope_interleaved": True} if "3" in name else section}
    config = getattr(HUB, f"{name}Config")(
        text_config={**TEXT, **rope, **({"head_dim": 8} if "3" in name else {})},
        vision_config={"depth": 2, "patch_size": 4, "temporal_patch_size": 2, "num_heads": 4, **vision},
        tie_word_embeddings=False,
        **ids,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, **HALF
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    base = getattr(HUB, "Qwen2VLProcessor" if "2_5" not in name else "Qwen2_5_VLProcessor")
    processor = processor_of(base, images, words, None, chat_template=template(image))
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)


QWEN = {"text": "model.language_model.layers", "vision": "model.visual.blocks"}
ZOO: dict[str, Family] = {
    "llama": Family(
        lambda: _text(HUB.LlamaForCausalLM(HUB.LlamaConfig(**TEXT))),
        {"text": "model.layers"},
        {"text": ["causal"]},
    ),
    "qwen2": Family(
        lambda: _text(HUB.Qwen2ForCausalLM(HUB.Qwen2Config(**TEXT))),
        {"text": "model.layers"},
        {"text": ["causal"]},
    ),
    "gemma2": Family(_gemma2, {"text": "model.layers"}, {"text": ["sliding_window", "causal", "sliding_window"]}),
    "gpt2": Family(_gpt2, {"text": "transformer.h"}, {"text": ["causal"]}),
    "qwen2_vl": Family(
        lambda: _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        QWEN,
        {"text": ["causal"], "vision": ["per_image"]},
    ),
    "qwen2_5_vl": Family(
        lambda: _qwen(
            "Qwen2_5_VL",
            {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        ),
        QWEN,
        {"text": ["causal"], "vision": ["image_windows", "per_image"]},
    ),
    "qwen3_vl": Family(
        lambda: _qwen(
            "Qwen3VL",
            {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        ),
        QWEN,
        {"text": ["causal"], "vision": ["per_image"]},
    ),
}
