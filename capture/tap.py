"""The one door to attention: a registered attention function that shows every call before it answers it.

transformers looks attention up by name in a table. While `tapped` is active, every attention module of the
model finds our function there: it computes what the model would have computed, by the implementation that the
model had, and hands query, key, value, mask and output to an observer. Logits stay as they were, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from mechanistic.store.errors import ModelError

# The library tests names for the substrings of its own implementations; this one must contain none of them.
NAME = "mechanistic_tap"

# Set on a mask that the library would not have made: its absence lets sdpa take its fastest kernel.
_NOT_NEEDED = "_mechanistic_not_needed"


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention module; keys and values are not repeated over the heads of a group.

    query (batch, head, query, d_head) and key, value (batch, kv_head, key, d_head), after rotary positions;
    output (batch, query, head, d_head), before the output projection; mask None or broadcastable to
    (batch, head, query, key), boolean with True where attention may go, or additive.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None
    position_bias: Tensor | None
    causal: bool

    def allowed(self) -> Tensor:
        """Which keys each query may attend to: (batch or 1, head or 1, query, key), boolean."""
        if self.mask is None:
            queries, keys = self.query.shape[2], self.key.shape[2]
            full = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
            return (full.tril(keys - queries) if self.causal and queries > 1 else full)[None, None]
        if self.mask.dtype == torch.bool:
            return self.mask
        return self.mask > torch.finfo(self.mask.dtype).min / 2

    def pattern(self) -> Tensor:
        """Attention weights rebuilt from query and key: (batch, head, query, key), float32."""
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key.float().repeat_interleave(groups, dim=1)
        scores = self.query.float() @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.position_bias is not None:
            scores = scores + self.position_bias.float()
        scores = scores.masked_fill(~self.allowed(), torch.finfo(scores.dtype).min)
        if self.sinks is None:
            return scores.softmax(-1)
        sink = self.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


Observer = Callable[[AttentionCall], None]


@dataclass
class _Tapped:
    """One configuration that points to the tap: what it said before, and who watches."""

    config: Any
    implementation: str | None
    taps: tuple[Tap, ...] = ()


# By id of the configuration, which the entry keeps alive. Not a context variable: a cell of a notebook that
# runs the model is another context than the cell that attached the tap.
_tapped: dict[int, _Tapped] = {}
_changing = RLock()


class Tap:
    """An observer of every attention call of a model, from its making until `remove`.

    Taps of one model may come and go in any order: each sees every call, and with the last of them the model
    is exactly as it was before the first.
    """

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        _register()
        self.observer = observer
        self._configs = [id(config) for config in attention_configs(model)]
        with _changing:
            for config in attention_configs(model):
                entry = _tapped.get(id(config))
                if entry is None:
                    entry = _tapped[id(config)] = _Tapped(config, config._attn_implementation_internal)
                    config._attn_implementation_internal = NAME
                entry.taps += (self,)

    def remove(self) -> None:
        """Stop watching; a second time does nothing."""
        with _changing:
            for key in self._configs:
                entry = _tapped[key]
                entry.taps = tuple(tap for tap in entry.taps if tap is not self)
                if entry.taps:
                    continue
                del _tapped[key]
                # Whoever chose another implementation meanwhile keeps it.
                if entry.config._attn_implementation_internal == NAME:
                    entry.config._attn_implementation_internal = entry.implementation
            self._configs = []


@contextmanager
def tapped(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show every attention call of `model` to `observer`; afterwards the model is exactly as it was.

    Taps of one model nest: the inner and the outer observer both see every call.
    """
    tap = Tap(model, observer)
    try:
        yield
    finally:
        tap.remove()


def attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration object that decides how some module of `model` attends, each once."""
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _make_mask)


def _make_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The mask that sdpa would get, never None: a name without a mask function gets no mask at all."""
    from transformers.masking_utils import sdpa_mask

    needed: Tensor | None = sdpa_mask(*args, **kwargs)
    if needed is not None:
        return needed
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, **{**kwargs, **skips})
    assert mask is not None
    setattr(mask, _NOT_NEEDED, True)
    return mask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    entry = _tapped.get(id(getattr(module, "config", None)))
    if entry is None:
        raise ModelError(
            f"{type(module).__name__} still looks for the attention tap, but no capture is running.",
            "Load the model again: it was copied or pickled while it was being captured.",
        )
    output, weights = _compute(entry.implementation, module, query, key, value, attention_mask, kwargs)
    # Sliding-window layers of a model may get the window from their call or keep it on the module.
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    scale = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    call = AttentionCall(
        module=module,
        query=query.detach(),
        key=key.detach(),
        value=value.detach(),
        output=output.detach(),
        mask=attention_mask,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        softcap=kwargs.get("softcap"),
        window=window if isinstance(window, int) and window > 0 else None,
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
    )
    for tap in entry.taps:
        tap.observer(call)
    return output, weights


def _compute(
    own: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model's own implementation answers; sdpa for those whose masks have another form."""
    if own == "eager" or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise ModelError(
                f"{type(module).__name__} needs its own attention code, and its module has none to call.",
                'Load the model with attn_implementation="sdpa".',
            )
        result: tuple[Tensor, Tensor | None] = eager(
            module, query, key, value, additive(mask, query), **kwargs
        )
        return result
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    needed = None if getattr(mask, _NOT_NEEDED, False) else mask
    output, _ = sdpa_attention_forward(module, query, key, value, needed, **kwargs)
    return output, None


def additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask in the form that is added to attention scores of the dtype of `like`."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, lowest)
