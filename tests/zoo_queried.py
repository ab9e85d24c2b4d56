"""Models of the zoo that read images by cross-attention: through learned queries, or word by word."""

from __future__ import annotations

from typing import Any

from zoo_parts import HALF, HUB, PLAIN, TEXT, VOCABULARY, grown, siglip, template, tokenizer

from mechanistic.capture.models import LoadedModel
from mechanistic.capture.train_architecture import END

TOWER = {key: value for key, value in siglip().items() if key != "vision_use_head"}
QUERIES = 4


def queried(name: str) -> LoadedModel:
    """BLIP-2 before an OPT, or InstructBLIP before a Llama."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words, images = tokenizer(), BlipImageProcessorPil(size=SQUARE, **HALF)
    opt = {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 99}
    instructed = "Instruct" in name
    former = {**PLAIN, "num_hidden_layers": 3, "cross_attention_frequency": 2, "encoder_hidden_size": 16}
    config = getattr(HUB, f"{name}Config")(
        vision_config=TOWER,
        qformer_config={**former, "hidden_size": 24, "num_attention_heads": 2},
        text_config={**TEXT, "model_type": "llama"}
        if instructed
        else {**PLAIN, **opt, "tie_word_embeddings": False},
        num_query_tokens=QUERIES,
        image_token_index=VOCABULARY["<image>"],
    )
    parts: list[Any] = [images, words]
    if instructed:
        parts.append(tokenizer(eos=True))
    processor = getattr(HUB, f"{name}Processor")(*parts, num_query_tokens=QUERIES)
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)


SQUARE = {"height": 32, "width": 32}
BLIP_WORDS = {
    "encoder_hidden_size": 16,
    "projection_dim": 16,
    "max_position_embeddings": 99,
    "bos_token_id": VOCABULARY["<|vision_start|>"],
    "sep_token_id": END,
}


def blip() -> LoadedModel:
    """BLIP as it captions; its decoder begins with another token than its tokenizer writes."""
    return _blip("BlipForConditionalGeneration")


def blip_matching() -> LoadedModel:
    """BLIP as it says whether a text is about an image."""
    return _blip("BlipForImageTextRetrieval")


def _blip(name: str) -> LoadedModel:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = HUB.BlipConfig(text_config={**PLAIN, **BLIP_WORDS}, vision_config=TOWER)
    processor = HUB.BlipProcessor(BlipImageProcessorPil(size=SQUARE, **HALF), tokenizer(eos=True))
    return grown(getattr(HUB, name)(config), processor, name)


def mllama() -> LoadedModel:
    """Mllama: one decoder layer of three crosses over, and the third encoder layer is gated."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    arrangements = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {
        **TOWER,
        "attention_heads": 2,
        "num_global_layers": 1,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": arrangements,
    }
    text = {
        **TEXT,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = HUB.MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY["<image>"])
    words = tokenizer(image_token="<image>")
    # As in the published one, the template writes the first token, and the image comes behind it.
    processor = HUB.MllamaProcessor(
        MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4, **HALF),
        words,
        chat_template="<s> " + template("<image>"),
    )
    return grown(HUB.MllamaForConditionalGeneration(config), processor, "mllama")
