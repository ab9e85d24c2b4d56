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
from mechanistic.capture.processors import without_video
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


@dataclass(frozen=True)
class Family:
    """`layers` names the list of layers of each stack, `masks` the rules that its layers follow.

    `text` is what its tokenizer must be told besides. `halves` names, by stack, the children of a layer whose
    outputs are its two halves and the one that reads what is between; None where there is no such thing.
    """

    build: Callable[[], LoadedModel]
    layers: Mapping[str, str]
    masks: Mapping[str, Sequence[str]]
    sizes: Sequence[tuple[int, int]] = ((32, 32), (50, 30), (30, 70))
    text: Mapping[str, Any] = field(default_factory=dict)
    halves: Mapping[str, tuple[str, str, str] | None] = field(default_factory=dict)

    def halves_of(self, stack: str) -> tuple[str, str, str] | None:
        """Those of `halves`, or the commonest."""
        return self.halves.get(stack, ("self_attn", "mlp", ""))

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
    processor = without_video(base)(images, words, None, chat_template=template(image))
    return grown(getattr(HUB, f"{name}ForConditionalGeneration")(config), processor, name)


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


def _gemma3() -> LoadedModel:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer(image_token="<image>", boi_token="<|vision_start|>", eoi_token="<|vision_end|>")
    config = HUB.Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
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


def _paligemma() -> LoadedModel:
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


def clip(**changes: Any) -> dict[str, Any]:
    """Configuration of a small CLIP tower: a class token and 16 patches of 8 x 8 pixels."""
    return {**siglip(), "projection_dim": 16, "model_type": "clip_vision_model", **changes}


def _llava(name: str) -> LoadedModel:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    anyres = "Next" in name
    grid = {"image_grid_pinpoints": PINPOINTS} if anyres else {}
    config = getattr(HUB, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=clip(),
        image_token_index=VOCABULARY["<image>"],
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


def _onevision() -> LoadedModel:
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


def _internvl() -> LoadedModel:
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


def _idefics3(name: str) -> LoadedModel:
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


PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}


def _bert() -> LoadedModel:
    words = tokenizer(eos=True)
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return grown(HUB.BertForMaskedLM(HUB.BertConfig(**PLAIN)), words, "bert")


def _clip() -> LoadedModel:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, **HALF)
    config = HUB.CLIPConfig(
        text_config={**PLAIN, "max_position_embeddings": 40}, vision_config=clip(), projection_dim=16
    )
    return grown(HUB.CLIPModel(config), HUB.CLIPProcessor(images, tokenizer(eos=True)), "clip")


def _siglip() -> LoadedModel:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    words = tokenizer(eos=True)
    words.model_input_names, words.model_max_length = ["input_ids"], 24
    config = HUB.SiglipConfig(
        text_config={**PLAIN, "max_position_embeddings": 24},
        vision_config=siglip(vision_use_head=True, hidden_size=32),
    )
    return grown(HUB.SiglipModel(config), HUB.SiglipProcessor(images, words), "siglip")


def _sees_only(name: str) -> LoadedModel:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = getattr(HUB, f"{name}Config")(**{k: v for k, v in siglip().items() if k != "vision_use_head"})
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    return grown(getattr(HUB, f"{name}Model")(config), processor, name)


TOWERS = {"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"}
TOWER = {"text": "model.language_model.layers", "vision": "model.vision_tower.encoder.layers"}
ATTN_MLP = ("attn", "mlp", "")
NORMED = {"text": ("post_attention_layernorm", "post_feedforward_layernorm", "")}
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
    "gemma2": Family(
        _gemma2, {"text": "model.layers"}, {"text": ["sliding_window", "causal", "sliding_window"]}
    ),
    "gpt2": Family(_gpt2, {"text": "transformer.h"}, {"text": ["causal"]}, halves={"text": ATTN_MLP}),
    "qwen2_vl": Family(
        lambda: _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        QWEN,
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"vision": ATTN_MLP},
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
        halves={"vision": ATTN_MLP},
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
        halves={"vision": ATTN_MLP},
    ),
    "gemma3": Family(
        _gemma3,
        TOWER,
        {"text": ["sliding_window_image_blocks", "causal_image_blocks"], "vision": ["per_image"]},
        halves=NORMED,
    ),
    "paligemma": Family(_paligemma, TOWER, {"text": ["prefix"], "vision": ["per_image"]}),
    "llava": Family(lambda: _llava("Llava"), TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "llava_next": Family(lambda: _llava("LlavaNext"), TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "llava_onevision": Family(_onevision, TOWER, {"text": ["causal"], "vision": ["per_image"]}),
    "internvl": Family(
        _internvl,
        {**TOWER, "vision": "model.vision_tower.encoder.layer"},
        {"text": ["causal"], "vision": ["per_image"]},
        halves={"vision": ("attention", "mlp", "layernorm_after")},
    ),
    "idefics3": Family(
        lambda: _idefics3("Idefics3"),
        {"text": "model.text_model.layers", "vision": "model.vision_model.encoder.layers"},
        {"text": ["causal"], "vision": ["per_image"]},
    ),
    "smolvlm": Family(
        lambda: _idefics3("SmolVLM"),
        {"text": "model.text_model.layers", "vision": "model.vision_model.encoder.layers"},
        {"text": ["causal"], "vision": ["per_image"]},
    ),
    "bert": Family(_bert, {"text": "bert.encoder.layer"}, {"text": ["bidirectional"]}, halves={"text": None}),
    "vit": Family(
        lambda: _sees_only("ViT"),
        {"vision": "layers"},
        {"vision": ["per_image"]},
        halves={"vision": ("attention", "mlp", "")},
    ),
    "dinov2": Family(
        lambda: _sees_only("Dinov2"),
        {"vision": "encoder.layer"},
        {"vision": ["per_image"]},
        halves={"vision": ("layer_scale1", "layer_scale2", "")},
    ),
    "clip": Family(_clip, TOWERS, {"text": ["causal"], "vision": ["per_image"]}),
    "siglip": Family(
        _siglip,
        TOWERS,
        {"text": ["bidirectional"], "vision": ["per_image"]},
        text={"padding": "max_length", "padding_side": "right"},
    ),
}


def _mllama() -> Any:
    vision = {
        **siglip(),
        "num_global_layers": 1,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }
    vision.pop("vision_use_head")
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = HUB.MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY["<image>"])
    return HUB.MllamaForConditionalGeneration(config)


def _queried(name: str) -> Any:
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    opt = {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 99}
    config = getattr(HUB, f"{name}Config")(
        vision_config=tower,
        qformer_config={**PLAIN, "hidden_size": 16, "num_attention_heads": 2, "encoder_hidden_size": 16},
        text_config={**PLAIN, **opt},
        num_query_tokens=4,
        image_token_index=VOCABULARY["<image>"],
    )
    return getattr(HUB, f"{name}ForConditionalGeneration")(config)


def _blip() -> Any:
    text = {**PLAIN, "encoder_hidden_size": 16, "projection_dim": 16}
    tower = {k: v for k, v in siglip().items() if k != "vision_use_head"}
    return HUB.BlipForConditionalGeneration(HUB.BlipConfig(text_config=text, vision_config=tower))


# Models that are not captured, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mllama": (_mllama, r"2 lists of layers \(transformer\.layers, global_transformer\.layers\)"),
    "blip-2": (lambda: _queried("Blip2"), r"where the image tokens of 'blip-2' lie"),
    "instructblip": (lambda: _queried("InstructBlip"), r"where the image tokens of 'instructblip' lie"),
    "blip": (_blip, r"could not establish the id of the image token"),
}
