"""The decoder layers inside a worker of vLLM, and what their attention kernels were told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechanistic.store.errors import ModelError


@dataclass(frozen=True)
class EngineLayer:
    """A decoder layer and its attention; head counts are those of this process."""

    number: int
    path: str
    layer: nn.Module
    attention: nn.Module

    @property
    def _kernel(self) -> Any:
        return self.attention.impl

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.attention.num_heads)  # type: ignore[arg-type]

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return int(self.attention.num_kv_heads)  # type: ignore[arg-type]

    @property
    def head_width(self) -> int:
        """Width of a query and of a key."""
        return int(self.attention.head_size)  # type: ignore[arg-type]

    @property
    def sinks(self) -> Tensor:
        """The sink logit of each head."""
        found: Tensor = self._kernel.sinks
        return found.detach().float().cpu()

    @property
    def has_sinks(self) -> bool:
        """Whether there are any."""
        return getattr(self._kernel, "sinks", None) is not None

    def describe(self) -> dict[str, Any]:
        """What decides how it attends, JSON-like."""
        attention: Any = self.attention
        window, softcap = attention.sliding_window, getattr(self._kernel, "logits_soft_cap", None)
        return {
            "number": self.number,
            "path": self.path,
            "class": type(self.layer).__name__,
            "kernel": str(attention.backend.name),
            "type": str(getattr(attention.attn_type, "value", attention.attn_type)),
            "scale": float(self._kernel.scale),
            "window": int(window) if window else None,
            "softcap": float(softcap) if softcap else None,
            "sinks": self.has_sinks,
            "alibi": getattr(self._kernel, "alibi_slopes", None) is not None,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_width": self.head_width,
            "value_width": int(attention.head_size_v),
        }


def find_engine_layers(model: nn.Module) -> list[EngineLayer]:
    """The decoder layers, in order.

    Raises
    ------
    ModelError    some layer does not attend by vLLM's own attention, or they are not one plain stack.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    modules = dict(model.named_modules())
    found: list[EngineLayer] = []
    for name, module in modules.items():
        if not isinstance(module, AttentionLayerBase):
            continue
        if type(module) is not Attention:
            # The image encoder's attention keeps no cache, and is not the decoder's.
            if not hasattr(module, "kv_cache"):
                continue
            raise ModelError(
                f"{name} of the engine attends by {type(module).__name__}, which shows no queries and keys.",
                "Capture this model with transformers.",
            )
        inside = layer_of(name)
        if inside is not None:
            found.append(EngineLayer(*inside, modules[inside[1]], module))
    found.sort(key=lambda each: each.number)
    stacks = {each.path.rpartition(".")[0] for each in found}
    if len(stacks) != 1 or [each.number for each in found] != list(range(len(found))):
        raise ModelError(
            f"{type(model).__name__} of the engine has no one stack of decoder layers that attend "
            f"({', '.join(sorted(stacks)) or 'none'}).",
            "Try --engine-option model_impl=transformers, or capture it with transformers.",
        )
    return found


def layer_of(name: str) -> tuple[int, str] | None:
    """Number and path of the layer that a module is inside, by its own path."""
    parts = name.split(".")
    place = max((at for at, part in enumerate(parts) if part.isdigit()), default=None)
    return None if place is None else (int(parts[place]), ".".join(parts[: place + 1]))


def find_readout(model: nn.Module, tokens: list[int]) -> dict[str, Tensor] | None:
    """Final norm, and unembedding rows of those `tokens` that this process owns; None where not found."""
    layers = find_engine_layers(model)
    holder_path = layers[0].path.rpartition(".")[0].rpartition(".")[0]
    norms = [
        child
        for name, child in model.get_submodule(holder_path).named_children()
        if "norm" in type(child).__name__.lower() and getattr(child, "weight", None) is not None
    ]
    heads = [each for each in model.modules() if type(each).__name__ == "ParallelLMHead"]
    if not heads:
        # With tied weights the embedding is the head.
        heads = [each for each in model.modules() if type(each).__name__ == "VocabParallelEmbedding"]
    if len(norms) != 1 or len(heads) != 1:
        return None
    head: Any = heads[0]
    first, stop = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
    owned = torch.tensor([token for token in tokens if first <= token < stop], dtype=torch.int64)
    rows = (owned - first).to(head.weight.device)
    out: dict[str, Any] = {"tokens": owned, "unembed": head.weight[rows], "norm": norms[0].weight}
    for name, module in (("norm_bias", norms[0]), ("unembed_bias", head)):
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            out[name] = bias if name == "norm_bias" else bias[rows]
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}
