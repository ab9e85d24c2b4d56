"""What the models of the zoo are made of: one small vocabulary, towers, random parameters."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_models import randomise
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
# Some processors add tokens of their own.
IDS = {"vocab_size": len(VOCABULARY) + 8, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
TEXT = {**WIDE, **IDS, "max_position_embeddings": 512, "tie_word_embeddings": False}
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}


def template(image: str) -> str:
    """A chat template that writes `image` for each image."""
    return (
        "{% for message in messages %}user {% if message['content'] is string %}{{ message['content'] }} "
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}assistant"
    )


def tokenizer(*, bos: bool = True, eos: bool = False, **special: str) -> Any:
    """One token a word; `special` names further special tokens, such as image_token."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or eos:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
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


def siglip(**changes: Any) -> dict[str, Any]:
    """Configuration of a small SigLIP tower: 16 patches of 8 x 8 pixels."""
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
        **changes,
    }


def clip(**changes: Any) -> dict[str, Any]:
    """Configuration of a small CLIP tower: a class token and 16 patches of 8 x 8 pixels."""
    return {**siglip(), "projection_dim": 16, "model_type": "clip_vision_model", **changes}
