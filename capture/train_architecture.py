"""The parts of spatial-tiny before training: vocabulary, processor, and a model whose weights start well."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

# The class that needs Pillow alone; the one that transformers picks by itself asks for torchvision.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .shapes_drawing import COLOURS, RELATIONS, SHAPES, SIDE

PATCH = 8
GRID = SIDE // PATCH
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
COLUMNS = tuple(f"c{i}" for i in range(GRID))
ROWS = tuple(f"r{i}" for i in range(GRID))
THIRDS_DOWN = ("top", "middle", "bottom")
THIRDS_ACROSS = ("left", "centre", "right")
BACKGROUND = "background"
ASKING = "user assistant ? the and is in to what which where relative colour shape object row column"
# dict.fromkeys drops the second 'left' and 'right'.
_EVERY = [*SPECIAL, *ASKING.split(), *RELATIONS, *THIRDS_DOWN, *THIRDS_ACROSS, BACKGROUND, *COLOURS, *SHAPES]
WORDS = tuple(dict.fromkeys([*_EVERY, *COLUMNS, *ROWS]))
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
PAD, UNKNOWN, BEGIN, END, IMAGE = range(len(SPECIAL))

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


# transformers annotates its calls only in part, so a strict check of them would say nothing.
_transformers: Any = transformers


def build_processor() -> Any:
    """LlavaProcessor: word-level tokenizer, 64 x 64 pixels scaled to [-1, 1], and the chat template."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    tokenizer = _transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return _transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def build_model(seed: int) -> Any:
    """LlavaForConditionalGeneration, a million parameters: 3 CLIP layers, 4 Llama layers, 64 image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = _transformers.LlavaForConditionalGeneration(config).float()
    model.generation_config = _transformers.GenerationConfig(
        do_sample=False, max_new_tokens=4, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD
    )
    _start_well(model)
    return model


def _start_well(model: Any) -> None:
    """Start attention as content similarity and patches with their place.

    From the usual random weights the model stays at naming the colours that are present.
    """
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.normal_(0, 0.5)
        model.lm_head.weight.copy_(0.1 * words)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
            attention.q_proj.weight.mul_(1.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        places = model.model.vision_tower.embeddings.position_embedding.weight
        # Row 0 is the class token.
        places[1:] = 0.3 * grid_positions(places.shape[1])


def grid_positions(width: int) -> torch.Tensor:
    """(GRID * GRID, width): sines and cosines of column and row, from half a period over the grid upwards."""
    frequency = (math.pi / (2 * GRID)) * torch.exp(torch.linspace(0, math.log(2 * GRID), width // 4))
    middle = torch.arange(GRID) + 0.5
    y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(middle, middle, indexing="ij"))
    across, down = x * frequency, y * frequency
    return torch.cat([torch.sin(across), torch.cos(across), torch.sin(down), torch.cos(down)], dim=1)
