"""Tiny models of random weights that vLLM's own classes can run: heads of 32, which its CPU kernel needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import picture
from zoo_parts import HALF, HUB, TEXT, VOCABULARY, grown, siglip, template, tokenizer

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel

NAMES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "attn_stats", "pattern"),
)
SITES = [f"text.*.{name}" for name in NAMES]
VISION = [f"vision.*.{name}" for name in NAMES]
# Longest answer, and questions of the longer run of the bundled model.
ANSWER, QUESTIONS = 3, 400
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDE: dict[str, Any] = {**TEXT, **HEADS}
SQUARE = {"height": 32, "width": 32}


def llama() -> LoadedModel:
    """Grouped key heads."""
    return grown(HUB.LlamaForCausalLM(HUB.LlamaConfig(**WIDE)), tokenizer(), "llama")


def qwen2() -> LoadedModel:
    """Biases on queries and keys; a tokenizer of letters, since its own class reads no other kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    ends = {"</s>": len(letters), "<pad>": len(letters) + 1}
    words = HUB.Qwen2Tokenizer(
        vocab=letters | ends, merges=[], unk_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    sizes = {"hidden_size": 128, "vocab_size": len(letters) + 8, "eos_token_id": ends["</s>"]}
    config = HUB.Qwen2Config(**{**WIDE, **sizes, "bos_token_id": None, "pad_token_id": ends["<pad>"]})
    made = grown(HUB.Qwen2ForCausalLM(config), words, "qwen2")
    made.model.generation_config.eos_token_id = ends["</s>"]
    made.model.generation_config.pad_token_id = ends["<pad>"]
    return made


def gemma2() -> LoadedModel:
    """Sliding windows, softcaps, norms behind the halves."""
    config = HUB.Gemma2Config(
        **{**WIDE, "num_hidden_layers": 3, "tie_word_embeddings": True},
        sliding_window=6,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )
    return grown(HUB.Gemma2ForCausalLM(config), tokenizer(), "gemma2")


def gemma3() -> LoadedModel:
    """Attends both ways inside an image, which vLLM's CPU kernel does not."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer(image_token="<image>", boi_token="<|vision_start|>", eoi_token="<|vision_end|>")
    words.add_tokens(["\n\n\n", "\n\n\n\n"])
    config = HUB.Gemma3Config(
        text_config={
            **WIDE,
            "query_pre_attn_scalar": 32,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=siglip(image_size=64),
        mm_tokens_per_image=16,
        image_token_id=VOCABULARY["<image>"],
        boi_token_index=VOCABULARY["<|vision_start|>"],
        eoi_token_index=VOCABULARY["<|vision_end|>"],
    )
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, do_pan_and_scan=False, **HALF)
    processor = HUB.Gemma3Processor(
        images, words, chat_template=template("<|vision_start|>"), image_seq_length=16
    )
    return grown(HUB.Gemma3ForConditionalGeneration(config), processor, "gemma3")


def llava() -> LoadedModel:
    """LLaVA 1.5."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    config = HUB.LlavaConfig(
        text_config={**WIDE, "model_type": "llama"},
        vision_config={**siglip(), "projection_dim": 16, "model_type": "clip_vision_model"},
        image_token_index=VOCABULARY["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        image_seq_length=16,
    )
    processor = HUB.LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, **HALF),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return grown(HUB.LlavaForConditionalGeneration(config), processor, "llava")


def qwen2_5_vl() -> LoadedModel:
    """Images of any size, rotary positions of three kinds."""
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
    rope = {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 10000.0}
    config = HUB.Qwen2_5_VLConfig(
        text_config={**WIDE, "hidden_size": 128, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "num_heads": 2,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **ids,
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size, **HALF)
    videos = HUB.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=size, **HALF)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = HUB.Qwen2_5_VLProcessor(images, words, videos, chat_template=template(image))
    return grown(HUB.Qwen2_5_VLForConditionalGeneration(config), processor, "qwen2_5_vl")


MODELS: Mapping[str, Callable[[], LoadedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
}
SEES = ("gemma3", "llava", "qwen2_5_vl", "spatial-tiny")


def save(name: str, folder: Path) -> None:
    """Write a model and its processor, under the names that vLLM's own class knows its weights by."""
    made = MODELS[name]()
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    if name in ("gemma3", "llava"):
        file = folder / "model.safetensors"
        tower = "vision_tower.vision_model."
        named = {
            key if tower in key else key.replace("vision_tower.", tower): value
            for key, value in load_file(file).items()
        }
        save_file(named, file, {"format": "pt"})


def sites(name: str) -> list[str]:
    """Everything that can be captured of a model."""
    return SITES + (VISION if name in SEES else [])


def samples(name: str) -> tuple[Sample, ...]:
    """Six questions of different lengths; one or two images a question, of different sizes, one twice."""
    extra = (
        "",
        " and the blue ring",
        " and",
        " and the blue ring and the red cross",
        " red",
        " and the cross",
    )
    sizes = ((32, 32), (50, 30), (30, 70))

    def images(number: int) -> tuple[Image.Image, ...]:
        count = (1 + number % 2) if name in SEES else 0
        # The last sample begins with the image of the first.
        first = number % 5
        return tuple(picture(10 * first + i, *sizes[(first + i) % len(sizes)]) for i in range(count))

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
        for number in range(6)
    )
