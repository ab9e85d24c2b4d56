"""What is proven about an engine on one sample, before anything of it is kept.

The engine's own words about its mask are not taken for it: head outputs are rebuilt from q, k and v under
each rule of the format, and the simplest rule that gives what the kernel gave is the one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError

from .anatomy import Stack
from .mask_rules import MaskRule, SequenceLayout, describe
from .proof import Proof, StackProof
from .residual import Halves, relative_error
from .tap import AttentionCall
from .vllm_spool import Spool

_PROBED = ("resid_pre", "resid_post")
_ATTENDED = ("q", "k", "v", "z")
# How the model's own code masks, where that is not causal: words of `warning_of`.
_OWN_MASK = {
    "gemma3": ("image_blocks", "both ways inside an image"),
    "paligemma": ("prefix", "both ways inside the prompt"),
}
_NO_PROJECTIONS = "the engine keeps its output projections in a form of its own"


def probed_tensors(attention: Collection[str]) -> tuple[str, ...]:
    """The tensors that the proof looks at."""
    return (*_PROBED, *(_ATTENDED if attention else ()))


def engine_call(
    spool: Spool, stack: Stack, told: Mapping[str, Any], lengths: Sequence[int], *, whole: bool
) -> AttentionCall:
    """One layer's attention over samples, padded on the right, as `tap.AttentionCall` has it; mask open.

    Parameters
    ----------
    whole
        With values and head outputs; without, keys and queries stand in for them.
    """
    layer = int(told["number"])
    wanted = [np.arange(length) for length in lengths]

    def padded(name: str, heads: int) -> Tensor:
        rows = spool.rows(name, layer, "all", wanted, heads)
        full = rows.new_zeros(len(lengths), max(lengths), *rows.shape[1:])
        start = 0
        for sample, length in enumerate(lengths):
            full[sample, :length] = rows[start : start + length]
            start += length
        return full

    query, key = padded("q", stack.heads), padded("k", stack.kv_heads)
    value = padded("v", stack.kv_heads) if whole else key
    output = padded("z", stack.heads) if whole else query
    return AttentionCall(
        module=stack.layers[layer],
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        output=output,
        mask=None,
        scale=told["scale"],
        softcap=told["softcap"],
        window=told["window"],
        sinks=spool.sinks(layer, stack.heads),
        position_bias=None,
        causal=True,
    )


def masked(call: AttentionCall, rule: MaskRule, layouts: Sequence[SequenceLayout]) -> AttentionCall:
    """The call under a rule. A causal one needs no mask of its own."""
    if rule == MaskRule("causal"):
        return replace(call, mask=None)
    width = call.query.shape[2]
    mask = torch.zeros(len(layouts), 1, width, width, dtype=torch.bool)
    for sample, layout in enumerate(layouts):
        mask[sample, 0, : len(layout), : len(layout)] = torch.from_numpy(rule.allowed(layout))
        # Padding looks at itself, so that no row is empty.
        mask[sample, 0, range(len(layout), width), range(len(layout), width)] = True
    return replace(call, mask=mask)


def candidates(window: int | None) -> tuple[MaskRule, ...]:
    """The rules to try, the simplest first; what the kernel was told of a window is tried before others."""
    plain = tuple(MaskRule(name) for name in ("causal", "causal_image_blocks", "prefix"))
    if window is None:
        return plain
    return (MaskRule("sliding_window", window), MaskRule("sliding_window_image_blocks", window), *plain)


def prove_layer(
    call: AttentionCall, stack: Stack, layout: SequenceLayout, tolerance: float
) -> tuple[MaskRule, float, float]:
    """The rule of one layer, and by how much head outputs and row sums rebuilt under it are off.

    Raises
    ------
    CaptureError    no rule gives what the kernel gave.
    """
    best = np.inf
    for rule in candidates(call.window):
        pattern = masked(call, rule, [layout]).pattern()
        mixed = pattern @ call.value.float().repeat_interleave(stack.heads // stack.kv_heads, dim=1)
        error = relative_error(mixed.transpose(1, 2), call.output)
        if error <= tolerance:
            sums = 0.0 if call.sinks is not None else float((pattern.sum(-1) - 1).abs().max())
            return rule, error, sums
        best = min(best, error)
    raise CaptureError(
        f"attention rebuilt from q and k is off by {best:.2g} of the kernel's output under every mask rule "
        f"(allowed: {tolerance:.0e}).",
        "The kernel does something that q, k and a mask rule do not hold (a quantised cache, a bias); "
        "ask for the residual stream alone, or capture with transformers.",
    )


def prove_stack(
    spool: Spool,
    stack: Stack,
    layout: SequenceLayout,
    layers: Sequence[Mapping[str, Any]],
    attention: Collection[str],
    tolerance: float,
) -> StackProof:
    """Everything about the decoder that the spool of one sample shows."""
    proof = StackProof(projection_problem=_NO_PROJECTIONS)
    wanted = [np.arange(len(layout))]
    posts: list[Tensor] = []
    for number in range(len(stack.layers)):
        pre, post = (spool.rows(name, number, "all", wanted, None) for name in _PROBED)
        if post.shape[-1] != stack.width:
            raise ModelError(
                f"text: its layers give {post.shape[-1]} numbers a token, not {stack.width} as configured.",
                "This architecture needs an adapter; until it has one, nothing of it is captured.",
            )
        if posts and not torch.equal(posts[-1], pre):
            proof.stream_is_unbroken = False
        posts[:] = [post]
    for told in layers if attention else ():
        call = engine_call(spool, stack, told, [len(layout)], whole=True)
        rule, error, sums = prove_layer(call, stack, layout, tolerance)
        number = int(told["number"])
        proof.rules[number] = rule
        proof.attention[str(number)] = describe(rule, call)
        proof.output_error, proof.row_sum_error = (
            max(proof.output_error, error),
            max(proof.row_sum_error, sums),
        )
    return proof


def join_halves(proof: StackProof, found: Sequence[Any]) -> None:
    """Put what the probes of all layers found into the proof, where they agree."""
    if all(found) and all(first[0] == second[0] for first, second in pairwise(found)):
        proof.halves = Halves(**found[0][0])
        proof.halves_error = max(float(error) for _, error in found)


def check_layers(layers: Sequence[Mapping[str, Any]], stack: Stack, ranks: int) -> None:
    """ModelError unless the engine's layers are those that the configuration says."""
    if len(layers) != len(stack.layers):
        raise ModelError(
            f"The engine has {len(layers)} decoder layers, its configuration {len(stack.layers)}.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    for told in layers:
        heads = (told["heads"], told["head_width"], told["value_width"])
        expected = (stack.heads // ranks, stack.head_width, stack.head_width)
        if heads != expected or told["kv_heads"] != max(1, stack.kv_heads // ranks):
            raise ModelError(
                f"text.{told['number']}: the engine has (heads, head width, value width) {heads}, "
                f"{told['kv_heads']} kv heads; the configuration says {expected} of {ranks} processes.",
                "This architecture needs an adapter; until it has one, nothing of it is captured.",
            )
        if told["alibi"] or told["type"] != "decoder":
            raise ModelError(
                f"text.{told['number']}: its attention is of type {told['type']}, or has a bias by distance.",
                "Capture this model with transformers.",
            )


def largest_change(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Largest difference, as a share of the largest logit."""
    return float(np.abs(after - before).max()) / max(float(np.abs(before).max()), 1e-30)


def warning_of(family: str, proof: StackProof, kernel: str) -> str | None:
    """What a reader must know where the engine masks otherwise than the model's own code."""
    own = _OWN_MASK.get(family)
    odd = [layer for layer, rule in proof.rules.items() if own is not None and own[0] not in rule.mask]
    if own is None or not odd:
        return None
    return (
        f"{len(odd)} of {len(proof.rules)} layers attend causally on this engine ({kernel}), where the "
        f"model's own code attends {own[1]}: these activations are not the model's own"
    )


def report(
    stack: Stack, proof: StackProof, *, begun: float, change: float, tolerance: float, warnings: list[str]
) -> Proof:
    """The proof, with the run's attribute `proven`."""
    described = {
        "path": stack.path,
        "taps": len(proof.rules),
        "row_sum_error": proof.row_sum_error,
        "attention_output_error": proof.output_error,
        "halves": None if proof.halves is None else proof.halves.definition,
        "halves_error": proof.halves_error,
        "resid_post_is_next_resid_pre": proof.stream_is_unbroken,
        "masks": sorted({rule.mask for rule in proof.rules.values()}),
    }
    attributes = {
        "tolerance": tolerance,
        "logits_change": change,
        "forwards": 3,
        "seconds": round(time.monotonic() - begun, 3),
        "stacks": {"text": described},
        "warnings": warnings,
    }
    return Proof({"text": proof}, attributes)
