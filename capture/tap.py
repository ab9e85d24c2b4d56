"""The one door to attention: a registered attention function that shows every call before it answers it.

transformers looks attention up by name in a table. While `tapped` is active, every attention module of the
model finds our function there: it computes what the model would have computed, by the implementation that the
model had, and hands query, key, value, mask and output to an observer. Logits stay as they were, bit for bit,
unless a tap carries an editor, which may put other tensors in the place of these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from mechanistic.store.errors import ModelError

from .attention_blip import hook_own_attention
from .attention_editor import Editor
from .attention_formula import attention_scores, attention_weights, repeat_heads

# The library tests names for the substrings of its own implementations; this one must contain none of them.
NAME = "mechanistic_tap"

# Set on a mask that the library would not have made: its absence lets sdpa take its fastest kernel.
_NOT_NEEDED = "_mechanistic_not_needed"


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention module; keys and values are not repeated over the heads of a group.

    query (batch, head, query, d_head) and key, value (batch, kv_head, key, d_head), after rotary positions;
    output (batch, query, head, d_head), before the output projection; mask None or broadcastable to
    (batch, head, query, key), boolean with True where attention may go, or additive. Where an editor was at
    work, they are what it left; `edited_pattern` is what it made of the weights themselves.
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
    edited_pattern: Tensor | None = None

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
        if self.edited_pattern is not None:
            return self.edited_pattern.float()
        return attention_weights(self.scores(), self.allowed(), self.sinks)

    def scores(self) -> Tensor:
        """What the softmax is taken of, before the mask: (batch, head, query, key), float32."""
        return attention_scores(self.query, self.key, self.scale, self.softcap, self.position_bias)


Observer = Callable[[AttentionCall], None]


@dataclass
class _Tapped:
    """One configuration that points to the tap: what it said before, and who watches."""

    config: Any
    implementation: str | None
    taps: tuple[Tap, ...] = ()
    hooks: tuple[Any, ...] = ()


# By id of the configuration, which the entry keeps alive. Not a context variable: a cell of a notebook that
# runs the model is another context than the cell that attached the tap.
_tapped: dict[int, _Tapped] = {}
_changing = RLock()


class Tap:
    """An observer of every attention call of a model, from its making until `remove`.

    Taps of one model may come and go in any order: each sees every call, and with the last of them the model
    is exactly as it was before the first. Their editors work one after the other, before any observer sees.
    """

    def __init__(self, model: nn.Module, observer: Observer, editor: Editor | None = None) -> None:
        _register()
        self.observer = observer
        self.editor = editor
        self._configs = [id(config) for config in attention_configs(model)]
        with _changing:
            for config in attention_configs(model):
                entry = _tapped.get(id(config))
                if entry is None:
                    entry = _tapped[id(config)] = _Tapped(config, config._attn_implementation_internal)
                    entry.hooks = tuple(hook_own_attention(model, config, _attend))
                    # Code of its own looks nothing up, and would still get the masks of that name.
                    if not entry.hooks:
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
                for hook in entry.hooks:
                    hook.remove()
                # Whoever chose another implementation meanwhile keeps it.
                if entry.config._attn_implementation_internal == NAME:
                    entry.config._attn_implementation_internal = entry.implementation
            self._configs = []


@contextmanager
def tapped(model: nn.Module, observer: Observer, editor: Editor | None = None) -> Iterator[None]:
    """Show every attention call of `model` to `observer`; afterwards the model is exactly as it was.

    Taps of one model nest: the inner and the outer observer both see every call.
    """
    tap = Tap(model, observer, editor)
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    own: tuple[Tensor, Tensor | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    entry = _tapped.get(id(getattr(module, "config", None)))
    if entry is None:
        raise ModelError(
            f"{type(module).__name__} still looks for the attention tap, but no capture is running.",
            "Load the model again: it was copied or pickled while it was being captured.",
        )
    editors = [tap.editor for tap in entry.taps if tap.editor is not None]
    given = (query, key, value, attention_mask)
    for editor in editors:
        query, key, value, attention_mask = editor.before(module, query, key, value, attention_mask)
    # What a module computed by itself stands unless an editor changed what it was computed from.
    stale = any(a is not b for a, b in zip(given, (query, key, value, attention_mask), strict=True))
    call = _describe(module, query, key, value, attention_mask, kwargs)
    weights: Tensor | None
    pattern: Tensor | None = None
    wanted = [editor for editor in editors if editor.edits_weights(module)]
    if wanted or (own is not None and stale):
        output, pattern = _by_formula(call, wanted, kwargs.get("dropout", 0.0))
        weights = pattern
    elif own is not None:
        output, weights = own
    else:
        output, weights = _compute(entry.implementation, module, query, key, value, attention_mask, kwargs)
    for editor in editors:
        output = editor.after(module, output)
    seen = {name: getattr(call, name).detach() for name in ("query", "key", "value")}
    call = replace(call, **seen, output=output.detach(), edited_pattern=_detached(pattern))
    for tap in entry.taps:
        tap.observer(call)
    return output, weights


def _describe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
    """The call before it is computed; its output is a placeholder."""
    # Sliding-window layers of a model may get the window from their call or keep it on the module.
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    scale, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    return AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        output=query,
        mask=mask,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        softcap=kwargs.get("softcap"),
        window=window if isinstance(window, int) and window > 0 else None,
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _by_formula(call: AttentionCall, editors: list[Editor], dropout: float) -> tuple[Tensor, Tensor]:
    """Output and weights of a call whose scores or weights are edited, in the model's dtype."""
    scores = call.scores()
    for editor in editors:
        scores = editor.scores(call.module, scores)
    pattern = attention_weights(scores, call.allowed(), call.sinks)
    for editor in editors:
        pattern = editor.pattern(call.module, pattern)
    weights = pattern.to(call.value.dtype)
    kept = nn.functional.dropout(weights, p=dropout, training=call.module.training)
    output = kept @ repeat_heads(call.value, call.query.shape[1])
    return output.transpose(1, 2).contiguous(), weights


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
