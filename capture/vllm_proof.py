"""What is proven about an engine on one sample, before anything of it is kept.

The engine's own words about its mask are not taken for it: head outputs are rebuilt from q, k and v under
each rule of the format, and the simplest rule that gives what the kernel gave is the one. On the first sample
of each other kind (with images, with several, longer than a window) that rule must give it again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError

from .anatomy import Anatomy, Stack
from .mask_rules import MaskRule, SequenceLayout, describe
from .proof import Proof, StackProof
from .rebuilt_attention import rebuild
from .residual import Halves
from .tap import AttentionCall
from .vllm_spool import Spool

_RESIDUAL = ("resid_pre", "resid_post")
ATTENDED = ("q", "k", "v", "z")
# What the proof looks at.
PROBED = (*_RESIDUAL, *ATTENDED)
# How the model's own code masks, where that is not causal: words of `warning_of`.
_OWN_MASK = {
    "gemma3": ("image_blocks", "both ways inside an image"),
    "paligemma": ("prefix", "both ways inside the prompt"),
}


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
        rows = spool.rows(f"text/{name}", layer, "text/all", wanted, heads)
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
        sums, error = rebuild(masked(call, rule, [layout]), stack, [len(layout)])
        if error <= tolerance:
            return rule, error, sums
        best = min(best, error)
    raise CaptureError(
        f"attention rebuilt from q and k is off by {best:.2g} of the kernel's output under every mask rule "
        f"(allowed: {tolerance:.0e}).",
        "The kernel does something that q, k and a mask rule do not hold (a quantised cache, a bias); "
        "ask for the residual stream alone, or capture with transformers.",
    )


def prove_residual(spool: Spool, stack: Stack, layers: int, length: int) -> StackProof:
    """What the spool of one sample of this many tokens shows of a stack's residual stream.

    Raises
    ------
    ModelError    it is not as wide as the configuration says.
    """
    proof = StackProof()
    wanted = [np.arange(length)]
    posts: list[Tensor] = []
    for number in range(layers):
        pre, post = (
            spool.rows(f"{stack.name}/{name}", number, f"{stack.name}/all", wanted, None)
            for name in _RESIDUAL
        )
        if post.shape[-1] != stack.width:
            raise ModelError(
                f"{stack.name}: its layers give {post.shape[-1]} numbers a token, not {stack.width} as "
                "configured.",
                "This architecture needs an adapter; until it has one, nothing of it is captured.",
            )
        if posts and not torch.equal(posts[-1], pre):
            proof.stream_is_unbroken = False
        posts[:] = [post]
    return proof


def prove_attention(
    spool: Spool,
    stack: Stack,
    layout: SequenceLayout,
    layers: Sequence[Mapping[str, Any]],
    proof: StackProof,
    tolerance: float,
) -> None:
    """Put into `proof` how each layer of the decoder attends, by the spool of one sample."""
    for told in layers:
        call = engine_call(spool, stack, told, [len(layout)], whole=True)
        rule, error, sums = prove_layer(call, stack, layout, tolerance)
        number = int(told["number"])
        proof.rules[number] = rule
        proof.attention[str(number)] = describe(rule, call)
        proof.output_error = max(proof.output_error, error)
        proof.row_sum_error = max(proof.row_sum_error, sums)


def check_attention(
    spool: Spool,
    stack: Stack,
    layout: SequenceLayout,
    layers: Sequence[Mapping[str, Any]],
    rules: Mapping[int, MaskRule],
    tolerance: float,
) -> None:
    """CaptureError unless the decoder attends to another sample by the rules that the first one proved."""
    for told in layers:
        number = int(told["number"])
        call = masked(engine_call(spool, stack, told, [len(layout)], whole=True), rules[number], [layout])
        _, error = rebuild(call, stack, [len(layout)])
        if error > tolerance:
            raise CaptureError(
                f"text.{number} attends by '{rules[number].mask}' to the sample that proved it, and not to "
                f"this one: head outputs are off by {error:.2g} (allowed: {tolerance:.0e}).",
                "Leave samples of its kind out, or capture them with --backend transformers.",
            )


def kind_of(layout: SequenceLayout, layers: Sequence[Mapping[str, Any]]) -> tuple[int | bool, ...]:
    """What of a sample may decide how an engine masks it: no, one or several images, and windows exceeded."""
    windows = sorted({told["window"] for told in layers} - {None})
    return (min(int(layout.blocks.max(initial=-1)) + 1, 2), *(len(layout) > window for window in windows))


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
    anatomy: Anatomy,
    proofs: Mapping[str, StackProof],
    *,
    begun: float,
    change: float,
    tolerance: float,
    warnings: list[str],
) -> Proof:
    """The proof, with the run's attribute `proven`."""
    described = {
        name: {
            "path": anatomy.stack(name).path,
            "taps": len(proof.rules),
            "row_sum_error": proof.row_sum_error,
            "attention_output_error": proof.output_error,
            "halves": None if proof.halves is None else proof.halves.definition,
            "halves_error": proof.halves_error,
            "resid_post_is_next_resid_pre": proof.stream_is_unbroken,
            "masks": sorted({rule.mask for rule in proof.rules.values()}),
        }
        for name, proof in proofs.items()
    }
    attributes = {
        "tolerance": tolerance,
        "logits_change": change,
        "forwards": 3,
        "seconds": round(time.monotonic() - begun, 3),
        "stacks": described,
        "warnings": warnings,
    }
    return Proof(proofs, attributes)
