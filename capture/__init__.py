"""Model + dataset -> run. Names load on first use, so that importing this package costs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation_cache import ActivationCache
    from .attention_cache import AttentionCache
    from .corruptions import corrupt_images
    from .cross_attention import extract_cross_attention
    from .dataset import Dataset, Sample
    from .job import CaptureSummary, capture_run, price_run
    from .models import LoadedModel, load_model
    from .shapes import Shapes

_HOMES = {
    "ActivationCache": "activation_cache",
    "AttentionCache": "attention_cache",
    "corrupt_images": "corruptions",
    "extract_cross_attention": "cross_attention",
    "Dataset": "dataset",
    "Sample": "dataset",
    "CaptureSummary": "job",
    "capture_run": "job",
    "price_run": "job",
    "LoadedModel": "models",
    "load_model": "models",
    "Shapes": "shapes",
}

__all__ = [
    "ActivationCache",
    "AttentionCache",
    "CaptureSummary",
    "Dataset",
    "LoadedModel",
    "Sample",
    "Shapes",
    "capture_run",
    "corrupt_images",
    "extract_cross_attention",
    "load_model",
    "price_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
