"""The library by itself: each sample alone, eager, generated with its cache, watched by plain hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from zoo import Family

from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel

# Longest answer.
ANSWER = 3


@dataclass
class Seen:
    """What one sample did alone: tensors by stack and layer, in the order of the calls."""

    residual: dict[tuple[str, str, int], list[torch.Tensor]] = field(default_factory=dict)
    weights: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    mixed: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    states: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    def stream(self, stack: str, end: str, layer: int) -> NDArray[Any]:
        """(token, d_model) over all calls."""
        parts = [part.reshape(-1, part.shape[-1]) for part in self.residual[stack, end, layer]]
        return np.asarray(torch.cat(parts).numpy())


def alone(family: Family, loaded: LoadedModel, prompt: str, sample: Sample) -> Seen:
    """The library by itself on one sample."""
    images = {"images": [list(sample.images)]} if sample.images else {}
    words = {"text": [prompt], **family.text} if "text" in family.layers else {}
    inputs = dict(loaded.processor(**words, return_tensors="pt", **images))
    inputs.pop("labels", None)
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    seen = Seen()
    with torch.no_grad(), watching(family, loaded.model, seen):
        if not loaded.model.can_generate():
            told: list[Any] = []
            inner = loaded.model.get_submodule(family.states)
            with inner.register_forward_hook(lambda _, args, out: told.append(out)):
                loaded.model(**inputs, output_hidden_states=True)
            seen.states = [told[0].get("text_model_output", told[0]).get("hidden_states")]
            return seen
        out = loaded.model.generate(
            **inputs,
            max_new_tokens=ANSWER + 1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    seen.states = list(out.hidden_states)
    new = out.sequences[0, inputs["input_ids"].shape[1] - family.unread :].tolist()
    ends = {loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id}
    stop = next((place for place, token in enumerate(new) if token in ends), len(new))
    seen.answer = new[: min(stop, ANSWER)]
    return seen


@contextmanager
def watching(family: Family, model: nn.Module, seen: Seen) -> Iterator[None]:
    """Eager attention, with its weights and outputs and the layers' inputs and outputs recorded."""
    owner: dict[nn.Module, tuple[str, int]] = {}
    with ExitStack() as stack:
        for name, path in family.layers.items():
            for number, layer in enumerate(model.get_submodule(path)):  # type: ignore[arg-type]
                owner |= {
                    part: (f"{name}/x" if "cross" in inside else name, number)
                    for inside, part in layer.named_modules()
                }
                pre, post = (
                    seen.residual.setdefault((name, end, number), []) for end in ("resid_pre", "resid_post")
                )
                before = layer.register_forward_pre_hook(
                    lambda _, args, kwargs, kept=pre: kept.append((args or (kwargs["hidden_states"],))[0]),
                    with_kwargs=True,
                )
                after = layer.register_forward_hook(
                    lambda _, args, out, kept=post: kept.append(
                        out if isinstance(out, torch.Tensor) else out[0]
                    )
                )
                for hook in own_hooks(owner, seen, layer):
                    stack.callback(hook.remove)
                for hook in half_hooks(family, name, number, layer, seen):
                    stack.callback(hook.remove)
                stack.callback(before.remove)
                stack.callback(after.remove)
        modules = {sys.modules[type(part).__module__] for part in owner}
        for module in (module for module in modules if hasattr(module, "eager_attention_forward")):
            honest = module.eager_attention_forward

            def record(part: nn.Module, *args: Any, honest: Any = honest, **kwargs: Any) -> Any:
                out, weights = honest(part, *args, **kwargs)
                if part in owner:
                    seen.weights.setdefault(owner[part], []).append(weights)
                    seen.mixed.setdefault(owner[part], []).append(out)
                return out, weights

            stack.enter_context(mock.patch.object(module, "eager_attention_forward", record))
        own = model.config._attn_implementation  # type: ignore[union-attr]
        model.set_attn_implementation("eager")  # type: ignore[operator]
        stack.callback(model.set_attn_implementation, own)  # type: ignore[arg-type]
        yield


def own_hooks(owner: dict[nn.Module, tuple[str, int]], seen: Seen, layer: nn.Module) -> Iterator[Any]:
    """Record weights and outputs of BLIP's attention, whose code is its own and returns its weights."""
    for part in layer.modules():
        kind = type(part).__name__
        if kind not in ("BlipAttention", "BlipTextSelfAttention"):
            continue
        weights, mixed = (kept.setdefault(owner[part], []) for kept in (seen.weights, seen.mixed))
        yield part.register_forward_hook(lambda _, args, out, kept=weights: kept.append(out[1]))
        if kind == "BlipAttention":
            yield part.projection.register_forward_pre_hook(  # type: ignore[union-attr]
                lambda _, args, kept=mixed: kept.append(args[0])
            )
        else:
            yield part.register_forward_hook(lambda _, args, out, kept=mixed: kept.append(out[0]))


def half_hooks(family: Family, stack: str, number: int, layer: nn.Module, seen: Seen) -> Iterator[Any]:
    """Record what the two halves of a layer give, or what is read between them."""
    halves = family.halves_of(stack, number)
    if halves is None:
        return
    attention, mlp, middle = halves
    if middle:
        kept = seen.residual.setdefault((stack, "resid_mid", number), [])
        yield layer.get_submodule(middle).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0])
        )
        return
    for name, child in (("attn_out", attention), ("mlp_out", mlp)):
        kept = seen.residual.setdefault((stack, name, number), [])
        yield layer.get_submodule(child).register_forward_hook(
            lambda _, args, out, kept=kept: kept.append(out if isinstance(out, torch.Tensor) else out[0])
        )


def unembedding(family: Family, loaded: LoadedModel) -> NDArray[Any] | None:
    """(word, d_model), times the final norm's weight; None where layers have no halves or write nothing."""
    norm = loaded.anatomy.final_norm
    if norm is None or family.halves_of("text") is None or not loaded.model.can_generate():
        return None
    signs = torch.ones(norm.weight.shape)  # type: ignore[arg-type]
    signs[::2] = -1
    with torch.no_grad():
        # What the norm multiplies by: of its input every number is 1 or -1.
        weight = (norm(signs) - norm(-signs)) / 2 * signs
        rows = loaded.model.get_output_embeddings().weight * weight
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(-1, keepdim=True)
    return np.asarray(rows.numpy())
