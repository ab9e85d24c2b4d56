"""Models of the zoo whose decoder reads images among its words."""

from __future__ import annotations

from typing import Any

from zoo_parts import HALF, HUB, TEXT, VOCABULARY, clip, grown, siglip, template, tokenizer

from mechanistic.capture.models import LoadedModel
from mechanistic.capture.processors import without_video
from mechanistic.capture.train_architecture import PAD


def _qwen_encoder(name: str, width: int) -> dict[str, Any]:
    plain = {"depth": 2, "patch_size": 4, "temporal_patch_size": 2, "num_heads": 4}
    if name == "Qwen2VL":
        return {**plain, "embed_dim": 16, "hidden_size": width, "mlp_ratio": 2}
    sizes = {"hidden_size": 16, "out_hidden_size": width, "intermediate_size": 24}
    if name == "Qwen2_5_VL":
        return {**plain, **sizes, "window_size": 16, "fullatt_block_indexes": [1]}
    return {**plain, **sizes, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


def qwen(name: str, videos: Any = None, **text: Any) -> LoadedModel:
    """Qwen2-VL and its successors, by the prefix of their classes."""
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
    sizes = {**TEXT, **({"head_dim": 8} if "3" in name else {}), **text}
    turns = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]) // 8
    section = {"mrope_section": [turns, turns, 2 * turns], "rope_type": "default", "rope_theta": 10000.0}
    rope = {"rope_parameters": {**section, "mrope_interleaved": True} if "3" in name else section}
    config = getattr(HUB, f"{name}Config")(
        text_config={**sizes, **rope},
        vision_config=_qwen_encoder(name, sizes["hidden_size"]),
        tie_word_embeddings=False,
        **ids,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, **HALF
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    base = getattr(HUB, f"{name}Processor")
    # What reads videos needs torchvision, which only some environments have.
    made = without_video(base) if videos is None else base
    processor = made(images, words, videos, chat_template=template(image))
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)


def gemma3_cropping() -> LoadedModel:
    """Gemma 3 whose processor adds crops of long images, up to three."""
    loaded = gemma3()
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 3}
    loaded.processor.images_kwargs = {**loaded.processor.images_kwargs, **crops}
    return loaded


def gemma3(**text: Any) -> LoadedModel:
    """Gemma 3 with one local and one global layer."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer(image_token="<image>", boi_token="<|vision_start|>", eoi_token="<|vision_end|>")
    words.add_tokens(["\n\n\n", "\n\n\n\n"])
    config = HUB.Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            **text,
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


def paligemma() -> LoadedModel:
    """PaliGemma, which has no chat template."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = HUB.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
        vision_config={**siglip(), "projection_dim": 32, "model_type": "siglip_vision_model"},
        projection_dim=32,
        image_token_id=VOCABULARY["<image>"],
    )
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    images.image_seq_length = 16
    processor = HUB.PaliGemmaProcessor(images, tokenizer(bos=False, image_token="<image>"))
    return grown(HUB.PaliGemmaForConditionalGeneration(config), processor, "paligemma")


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava(name: str, **text: Any) -> LoadedModel:
    """LLaVA 1.5 or LLaVA-NeXT."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    anyres = "Next" in name
    grid = {"image_grid_pinpoints": PINPOINTS} if anyres else {}
    config = getattr(HUB, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config=clip(),
        image_token_index=VOCABULARY["<image>"],
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **grid,
    )
    square = {"height": 32, "width": 32}
    # The published processors of 1.5 scale the shorter side and cut the rest off.
    size = {"size": {"shortest_edge": 32}, "crop_size": square, **HALF}
    images = LlavaNextImageProcessorPil(**size, **grid) if anyres else LlavaImageProcessorPil(**size)
    processor = getattr(HUB, f"{name}Processor")(
        image_processor=images,
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)


def onevision() -> LoadedModel:
    """LLaVA-OneVision."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    config = HUB.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**siglip(), "model_type": "siglip_vision_model"},
        image_token_index=VOCABULARY["<image>"],
        video_token_index=VOCABULARY["<|video_pad|>"],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS, **HALF
    )
    processor = without_video(HUB.LlavaOnevisionProcessor)(
        images,
        tokenizer(bos=False, image_token="<image>", video_token="<|video_pad|>"),
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return grown(HUB.LlavaOnevisionForConditionalGeneration(config), processor, "onevision")


def internvl() -> LoadedModel:
    """InternVL, cutting up to three tiles."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    config = HUB.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={
            **siglip(image_size=[32, 32], patch_size=[8, 8]),
            "model_type": "internvl_vision",
            "layer_scale_init_value": 0.1,
        },
        image_token_id=VOCABULARY["<image>"],
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=3, **HALF)
    words = tokenizer(
        bos=False,
        context_image_token="<image>",
        video_token="<|video_pad|>",
        start_image_token="<|vision_start|>",
        end_image_token="<|vision_end|>",
    )
    processor = without_video(HUB.InternVLProcessor)(
        images, words, None, image_seq_length=4, chat_template=template("<image>")
    )
    return grown(HUB.InternVLForConditionalGeneration(config), processor, "internvl")


def idefics3(name: str) -> LoadedModel:
    """Idefics3 or SmolVLM, cutting up to four tiles."""
    from importlib import import_module

    kind = name.lower()
    library = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    config = getattr(HUB, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=siglip(),
        image_token_id=VOCABULARY["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )
    images = getattr(library, f"{name}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, **HALF
    )
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<|vision_start|>",
        global_image_token="<|vision_end|>",
        end_of_utterance_token="</s>",
    )
    base = getattr(HUB, f"{name}Processor")
    parts = [images, words]
    if "video_processor" in base.get_attributes():
        base, parts = without_video(base), [*parts, None]
    processor = base(*parts, image_seq_len=4, chat_template=template("<image>"))
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)
