"""The short names of models, and what each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mechanistic.store.errors import ModelError

BUNDLED = "spatial-tiny"
BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class ModelEntry:
    """What a short name stands for."""

    repository: str
    revision: str | None = None
    backend: str = "transformers"
    dtype: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)


REGISTRY: Mapping[str, ModelEntry] = {
    # Stored as bfloat16 to be small; computed in float32, which a CPU does faster.
    # vLLM's own LLaVA class knows its image encoder by names that transformers no longer writes.
    BUNDLED: ModelEntry("bundled", dtype="float32", engine={"model_impl": "transformers"}),
    "llava1.5": ModelEntry("llava-hf/llava-1.5-7b-hf"),
    "llava1.5-13b": ModelEntry("llava-hf/llava-1.5-13b-hf"),
    "llava1.6": ModelEntry("llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava1.6-mistral": ModelEntry("llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava-onevision": ModelEntry("llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "qwen2vl": ModelEntry("Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2vl-2b": ModelEntry("Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2vl-vllm": ModelEntry("Qwen/Qwen2-VL-7B-Instruct", backend="vllm"),
    "qwen2.5vl": ModelEntry("Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen2.5vl-3b": ModelEntry("Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen2.5vl-vllm": ModelEntry("Qwen/Qwen2.5-VL-7B-Instruct", backend="vllm"),
    "qwen3vl": ModelEntry("Qwen/Qwen3-VL-8B-Instruct"),
    "qwen3vl-vllm": ModelEntry("Qwen/Qwen3-VL-8B-Instruct", backend="vllm"),
    "gemma3": ModelEntry("google/gemma-3-4b-it"),
    "gemma3-12b": ModelEntry("google/gemma-3-12b-it"),
    "paligemma": ModelEntry("google/paligemma-3b-mix-224"),
    "paligemma2": ModelEntry("google/paligemma2-3b-mix-224"),
    "internvl": ModelEntry("OpenGVLab/InternVL3-8B-hf"),
    "smolvlm": ModelEntry("HuggingFaceTB/SmolVLM-Instruct"),
    "idefics3": ModelEntry("HuggingFaceM4/Idefics3-8B-Llama3"),
    "mllama": ModelEntry("meta-llama/Llama-3.2-11B-Vision-Instruct"),
    "blip": ModelEntry("Salesforce/blip-image-captioning-large"),
    "blip-itm": ModelEntry("Salesforce/blip-itm-base-coco"),
    "blip2": ModelEntry("Salesforce/blip2-opt-2.7b"),
    "instructblip": ModelEntry("Salesforce/instructblip-vicuna-7b"),
    "clip": ModelEntry("openai/clip-vit-large-patch14-336"),
    "siglip": ModelEntry("google/siglip-so400m-patch14-384"),
    "vit": ModelEntry("google/vit-base-patch16-224"),
    "dinov2": ModelEntry("facebook/dinov2-base"),
}


def backend_named(name: str, asked: str | None = None) -> str:
    """The backend that a model of this name runs on. ModelError if there is none as `asked`."""
    entry = REGISTRY.get(name)
    backend = asked or (entry.backend if entry is not None else BACKENDS[0])
    if backend not in BACKENDS:
        raise ModelError(f"There is no backend '{backend}'.", f"The backends are {', '.join(BACKENDS)}.")
    return backend
