"""Whether a model is exactly as it was: parameters, what wants gradients, hooks, attention, answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel, hash_parameters
from mechanistic.capture.tap import attention_configs
from mechanistic.capture.targeted_sample import target_sample


@contextmanager
def unchanged(loaded: LoadedModel, sample: Sample) -> Iterator[None]:
    """The model before the block and after it, whether it ends well or not, is the same bit for bit."""
    before = _state(loaded, sample)
    try:
        yield
    finally:
        assert _state(loaded, sample) == before


def _state(loaded: LoadedModel, sample: Sample) -> dict[str, Any]:
    model = loaded.model
    asked = target_sample(loaded, sample, 0, None)
    with torch.no_grad():
        answer = model(**asked.inputs).logits
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "weights": hash_parameters(model),
        "wants gradients": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is not None for parameter in model.parameters()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "attention": [config._attn_implementation for config in attention_configs(model)],
        "autograd": torch.is_grad_enabled(),
        "answer": answer.numpy().tobytes(),
    }
