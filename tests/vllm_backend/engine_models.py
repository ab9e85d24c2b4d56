"""Models of the zoo that vLLM's own classes can run: heads of 32, which its CPU kernel needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_models import Listed
from zoo import ZOO, Family, samples
from zoo_encoders import gemma2, text_only
from zoo_parts import HALF, HUB, TEXT, grown
from zoo_vision_language import gemma3, llava, qwen

from mechanistic.capture.models import LoadedModel, load_model

NAMES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "attn_stats", "pattern"),
)
# Questions of the longer run of the bundled model.
QUESTIONS = 400
# What is kept of models that answer at length, so that an engine with little memory preempts requests.
LONG, LONG_ANSWER = ("qwen2", "llava", "qwen2_5_vl"), 40
SOME = ("text.*.resid_post", "text.*.q[text]", "text.0.k", "text.1.attn_stats[text]")
HEADS = {"hidden_size": 64, "head_dim": 32}
WIDE = {"hidden_size": 128}


def qwen2() -> LoadedModel:
    """A tokenizer of letters, since its own class reads no other kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    ends = {"</s>": len(letters), "<pad>": len(letters) + 1}
    words = HUB.Qwen2Tokenizer(
        vocab=letters | ends, merges=[], unk_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    sizes = {**WIDE, "vocab_size": len(letters) + 8, "eos_token_id": ends["</s>"]}
    config = HUB.Qwen2Config(**{**TEXT, **sizes, "bos_token_id": None, "pad_token_id": ends["<pad>"]})
    made = grown(HUB.Qwen2ForCausalLM(config), words, "qwen2")
    made.model.generation_config.eos_token_id = ends["</s>"]
    made.model.generation_config.pad_token_id = ends["<pad>"]
    return made


def _qwen(name: str, **text: Any) -> LoadedModel:
    size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    reader = HUB.Qwen3VLVideoProcessor if "3" in name else HUB.Qwen2VLVideoProcessor
    return qwen(name, reader(patch_size=4, merge_size=2, size=size, **HALF), **text)


_BUILD: Mapping[str, Callable[[], LoadedModel]] = {
    "llama": lambda: text_only(HUB.LlamaForCausalLM(HUB.LlamaConfig(**{**TEXT, **HEADS}))),
    "qwen2": qwen2,
    "gemma2": lambda: gemma2(**HEADS, query_pre_attn_scalar=32, tie_word_embeddings=True),
    "gemma3": lambda: gemma3(**HEADS, query_pre_attn_scalar=32),
    "llava": lambda: llava("Llava", **HEADS),
    "qwen2_vl": lambda: _qwen("Qwen2VL", **WIDE),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL", **WIDE),
    "qwen3_vl": lambda: _qwen("Qwen3VL", **WIDE, head_dim=32),
}
MODELS = {name: replace(ZOO[name], build=build) for name, build in _BUILD.items()}
BUNDLED = replace(ZOO["llava"], build=lambda: load_model("spatial-tiny"))
FAMILIES: Mapping[str, Family] = {**MODELS, "spatial-tiny": BUNDLED}


def save(name: str, folder: Path) -> None:
    """Write a model and its processor, under the names that vLLM's own class knows its weights by."""
    made = MODELS[name].build()
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
    return [f"{stack}.*.{site}" for stack in FAMILIES[name].layers for site in NAMES]


def some_sites(name: str) -> list[str]:
    """Several kinds of sites."""
    return [*SOME, *(["vision.*.resid_post", "vision.*.k"] if FAMILIES[name].sees else [])]


def dataset(name: str, count: int = 6) -> Listed:
    """Six questions of different lengths."""
    return Listed(samples(FAMILIES[name], count))
