"""A forward with the library's own eager attention rewritten in one module: what edits are compared with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_patching import inputs_of
from torch import Tensor

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel

# Gets the number of the call in its forward, and a tensor (batch, head, query, key).
Rewrite = Callable[[int, Tensor], Tensor]


def same(_: int, tensor: Tensor) -> Tensor:
    return tensor


def logits_by_hand(
    loaded: LoadedModel, sample: Sample, path: str, *, scores: Rewrite = same, weights: Rewrite = same
) -> Tensor:
    """Logits of the last token where a module attends with other scores, or other weights."""
    attention = loaded.model.get_submodule(path)
    library = sys.modules[type(attention).__module__]
    own = library.eager_attention_forward
    calls: list[int] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
    ) -> tuple[Tensor, Any]:
        if module is not attention:
            return own(module, query, key, value, attention_mask, **rest)  # type: ignore[no-any-return]
        calls.append(len(calls))
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        scale = rest.get("scaling") or query.shape[-1] ** -0.5
        found = scores(calls[-1], query @ key.transpose(-1, -2) * scale)
        found = found if attention_mask is None else found + attention_mask
        chosen = weights(calls[-1], found.softmax(-1).nan_to_num())
        return (chosen @ value).transpose(1, 2).contiguous(), chosen

    # sdpa of the same numbers is what the library's own code would give.
    before = loaded.model.config._attn_implementation
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(library, "eager_attention_forward", attend)
        loaded.model.set_attn_implementation("eager")
        try:
            logits: Tensor = loaded.model(**inputs_of(loaded, sample), use_cache=False).logits[0, -1]
        finally:
            loaded.model.set_attn_implementation(before)
    assert calls
    return logits


def patched_by_hand(
    loaded: LoadedModel, base: Sample, source: Sample, path: str, rows: list[int], heads: Any = slice(None)
) -> Tensor:
    """Rows of attention of `source`, its tokens counted over calls and crops, in a forward of `base`."""
    kept: list[Tensor] = []

    def keep(_: int, weights: Tensor) -> Tensor:
        kept.append(weights.clone())
        return weights

    logits_by_hand(loaded, source, path, weights=keep)
    begins = [0]
    for each in kept:
        begins.append(begins[-1] + each.shape[0] * each.shape[2])

    def put(call: int, weights: Tensor) -> Tensor:
        new = weights.clone()
        size = weights.shape[2]
        for row in rows:
            crop, query = divmod(row - begins[call], size)
            if 0 <= crop < len(weights):
                new[crop, heads, query] = kept[call][crop, heads, query]
        return new

    return logits_by_hand(loaded, base, path, weights=put)
