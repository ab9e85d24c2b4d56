"""BLIP's attention, which the library's table of attention functions does not reach: seen from its modules.

Hooks show what its own code made: queries, keys and values as they leave their projections, and each head's
output before the next one. Masks stay those that its code adds to the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Is given the module, query, key, value and mask, and `own`, the output (batch, query, head, d_head) and
# weights that the module computed; returns those to go on with.
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def hook_own_attention(model: nn.Module, config: Any, attend: Attend) -> list[Any]:
    """Hook the modules of `model` that attend by BLIP's code and belong to `config`; none in other models."""
    by_class = {"BlipAttention": _hook_vision, "BlipTextSelfAttention": _hook_text}
    return [
        handle
        for module in model.modules()
        if (hook := by_class.get(type(module).__name__)) and getattr(module, "config", None) is config
        for handle in hook(module, attend)
    ]


def _hook_vision(module: Any, attend: Attend) -> list[Any]:
    made: list[Tensor] = []

    def projected(_: nn.Module, args: Any, output: Tensor) -> None:
        made[:] = output.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def mixed(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        own = (args[0].unflatten(-1, (module.num_heads, -1)), None)
        settings = {"scaling": module.scale, "dropout": module.dropout.p, "is_causal": False}
        output = attend(module, *made, None, own=own, **settings)[0]
        made.clear()
        return (output.flatten(2),)

    return [
        module.qkv.register_forward_hook(projected),
        module.projection.register_forward_pre_hook(mixed),
    ]


def _hook_text(module: Any, attend: Attend) -> list[Any]:
    made: dict[str, Tensor] = {}
    heads = module.num_attention_heads

    def projected(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_: nn.Module, args: Any, output: Tensor) -> None:
            made[name] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

        return keep

    def mixed(_: nn.Module, args: Any, kwargs: Any, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        across = kwargs.get("encoder_hidden_states") is not None
        mask = kwargs.get("encoder_attention_mask" if across else "attention_mask")
        cache = kwargs.get("past_key_values")
        if cache is not None:
            # It holds the keys of earlier tokens too, and those of the image, which are projected only once.
            kind = "cross_attention_cache" if across else "self_attention_cache"
            cached = getattr(cache, kind, cache).layers[module.layer_idx]
            made["key"], made["value"] = cached.keys, cached.values
        own = (result[0].unflatten(-1, (heads, -1)), result[1])
        settings = {"dropout": module.dropout.p, "is_causal": False}
        query, key, value = (made[name] for name in ("query", "key", "value"))
        output, weights = attend(module, query, key, value, mask, own=own, **settings)
        made.clear()
        return output.flatten(2), weights

    handles = [
        getattr(module, name).register_forward_hook(projected(name)) for name in ("query", "key", "value")
    ]
    return [*handles, module.register_forward_hook(mixed, with_kwargs=True)]
