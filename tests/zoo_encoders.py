"""Models of the zoo that read words alone, images alone, or both side by side."""

from __future__ import annotations

from typing import Any

from zoo_parts import HALF, HUB, IDS, PLAIN, TEXT, clip, grown, siglip, tokenizer

from mechanistic.capture.models import LoadedModel


def text_only(model: Any) -> LoadedModel:
    """A decoder without images, with its tokenizer."""
    return grown(model, tokenizer(), model.config.model_type)


def gemma2(**text: Any) -> LoadedModel:
    """Gemma 2: sliding windows, softcaps."""
    sizes = {**TEXT, "num_hidden_layers": 3, "head_dim": 8, "query_pre_attn_scalar": 8, **text}
    config = HUB.Gemma2Config(
        **sizes, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    )
    return text_only(HUB.Gemma2ForCausalLM(config))


def gpt_oss() -> LoadedModel:
    """gpt-oss: a sink in the softmax of every head, experts."""
    config = HUB.GptOssConfig(
        **TEXT,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return text_only(HUB.GptOssForCausalLM(config))


def gpt2() -> LoadedModel:
    """GPT-2."""
    config = HUB.GPT2Config(n_embd=32, n_layer=2, n_head=4, **IDS)
    return text_only(HUB.GPT2LMHeadModel(config))


def bert() -> LoadedModel:
    """BERT: no decoder, norms behind the sums."""
    words = tokenizer(eos=True)
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return grown(HUB.BertForMaskedLM(HUB.BertConfig(**PLAIN)), words, "bert")


def two_towers_clip() -> LoadedModel:
    """CLIP."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, **HALF)
    config = HUB.CLIPConfig(
        text_config={**PLAIN, "max_position_embeddings": 40}, vision_config=clip(), projection_dim=16
    )
    return grown(HUB.CLIPModel(config), HUB.CLIPProcessor(images, tokenizer(eos=True)), "clip")


def two_towers_siglip() -> LoadedModel:
    """SigLIP, whose text tower reads its padding."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    words = tokenizer(eos=True)
    words.model_input_names, words.model_max_length = ["input_ids"], 24
    config = HUB.SiglipConfig(
        text_config={**PLAIN, "max_position_embeddings": 24},
        vision_config=siglip(vision_use_head=True, hidden_size=32),
    )
    return grown(HUB.SiglipModel(config), HUB.SiglipProcessor(images, words), "siglip")


def sees_only(name: str) -> LoadedModel:
    """ViT or DINOv2."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = getattr(HUB, f"{name}Config")(**{k: v for k, v in siglip().items() if k != "vision_use_head"})
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    return grown(getattr(HUB, f"{name}Model")(config), processor, name)
