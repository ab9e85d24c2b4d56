"""What is proven about a model before anything of it is kept, on the first sample of the dataset.

It costs three forwards of that one sample: one as the model is, one observed, and one more as it is, to see
that nothing was left behind. What was proven, and how exactly, goes into the run's attribute `proven`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mechanistic.store.errors import CaptureError, ModelError

from .anatomy import Stack
from .batch import Batch
from .forward import encoder_sequences, last_prompt_logits
from .mask_rules import MaskRule, describe, find_rule
from .models import LoadedModel
from .residual import Halves, LayerProbe, relative_error
from .tap import AttentionCall, tapped

# Share of the largest value by which a rebuilt tensor may differ from the model's own.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass
class StackProof:
    """What one forward showed about one stack."""

    rules: dict[int, MaskRule] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    halves: Halves | None = None
    row_sum_error: float = 0.0
    output_error: float = 0.0
    halves_error: float | None = None
    stream_is_unbroken: bool = True


@dataclass(frozen=True)
class Proof:
    """Stacks by name; `attributes` is what the run keeps of it."""

    stacks: Mapping[str, StackProof]
    attributes: Mapping[str, Any]

    @property
    def rules(self) -> dict[str, dict[int, MaskRule]]:
        """Mask rule by stack and layer."""
        return {name: stack.rules for name, stack in self.stacks.items()}

    @property
    def halves(self) -> dict[str, Halves | None]:
        """The children that add up to a layer, by stack."""
        return {name: stack.halves for name, stack in self.stacks.items()}


def prove(loaded: LoadedModel, batch: Batch, attention: Collection[str]) -> Proof:
    """Attach to the model on one small batch and check that what will be stored is what the model does.

    Parameters
    ----------
    attention
        The stacks whose attention will be kept; of the others only the residual stream is looked at.

    Raises
    ------
    ModelError      a layer attends by code of its own, or shapes are not what the configuration says.
    CaptureError    rebuilt attention is not the model's own, no mask rule fits, or observing changes logits.
    """
    if loaded.dtype not in TOLERANCE:
        raise ModelError(
            f"This model computes in {loaded.dtype}, which cannot be captured.",
            f"Load it with dtype= one of {', '.join(TOLERANCE)}.",
        )
    tolerance = TOLERANCE[loaded.dtype]
    before = last_prompt_logits(loaded.model, batch)
    stacks, observed = _observe(loaded, batch, attention, tolerance)
    after = last_prompt_logits(loaded.model, batch)
    change = _largest(before, observed)
    left_behind = _largest(before, after)
    if change > tolerance or left_behind > tolerance:
        raise CaptureError(
            f"Observing this model changes its logits by {change:.2g}, and leaves {left_behind:.2g} changed.",
            'Load it with attn_implementation="eager" or in float32, or report this model.',
        )
    for name in attention:
        _check_stack(loaded.anatomy.stack(name), stacks[name], tolerance)
    report = {name: _report(loaded.anatomy.stack(name), stack) for name, stack in stacks.items()}
    attributes = {"tolerance": tolerance, "logits_change": change, "forwards": 3, "stacks": report}
    return Proof(stacks, attributes)


def _observe(
    loaded: LoadedModel, batch: Batch, attention: Collection[str], tolerance: float
) -> tuple[dict[str, StackProof], np.ndarray[Any, Any] | None]:
    anatomy = loaded.anatomy
    stacks = {name: StackProof() for name in anatomy.stacks if name != "vision" or any(batch.images)}
    layer_of = anatomy.module_layers(attention)
    probes = {name: [LayerProbe(layer, tolerance) for layer in anatomy.stack(name).layers] for name in stacks}

    def attended(call: AttentionCall) -> None:
        if call.module in layer_of:
            name, layer = layer_of[call.module]
            _examine(call, anatomy.stack(name), layer, stacks[name], batch)

    with ExitStack() as watching:
        watching.enter_context(tapped(loaded.model, attended))
        for probe in (probe for each in probes.values() for probe in each):
            watching.enter_context(probe.watching())
        logits = last_prompt_logits(loaded.model, batch)
    for name, each in probes.items():
        _join_halves(stacks[name], each)
    return stacks, logits


def _examine(call: AttentionCall, stack: Stack, layer: int, proof: StackProof, batch: Batch) -> None:
    where = f"{stack.name}.{layer}"
    got = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
    expected = (stack.heads, stack.kv_heads, stack.head_width)
    if got != expected or layer in proof.rules:
        raise ModelError(
            f"{where}: heads, kv heads and head width are {got}, its configuration says {expected}."
            if got != expected
            else f"{where}: attention is computed more than once in a forward.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    if call.position_bias is not None or _has_bias(call):
        raise ModelError(
            f"{where}: a position bias is added to its attention scores, which q and k do not hold.",
            "Models with relative position bias cannot be captured yet.",
        )
    layouts = batch.sequences if stack.name == "text" else encoder_sequences(call)
    rule = find_rule(call, layouts, where)
    proof.rules[layer] = rule
    proof.attention[str(layer)] = describe(rule, call)
    pattern = call.pattern()
    mixed = pattern @ call.value.float().repeat_interleave(stack.heads // stack.kv_heads, dim=1)
    for row, layout in enumerate(layouts):
        valid = slice(len(layout))
        if call.sinks is None:
            sums = pattern[row, :, valid].sum(-1)
            proof.row_sum_error = max(proof.row_sum_error, float((sums - 1).abs().max()))
        error = relative_error(mixed[row].transpose(0, 1)[valid], call.output[row, valid])
        proof.output_error = max(proof.output_error, error)


def _has_bias(call: AttentionCall) -> bool:
    """Whether an additive mask does more than open and close."""
    if call.mask is None or call.mask.dtype == torch.bool:
        return False
    return bool((call.mask[call.mask > torch.finfo(call.mask.dtype).min / 2] != 0).any())


def _join_halves(proof: StackProof, probes: list[LayerProbe]) -> None:
    known = [probe.found for probe in probes if probe.found is not None]
    if len(known) == len(probes) and len({halves for halves, _ in known}) == 1:
        proof.halves = known[0][0]
        proof.halves_error = max(error for _, error in known)
    for lower, upper in pairwise(probes):
        # Layers may be on different devices.
        if (
            lower.post is None
            or upper.pre is None
            or not torch.equal(lower.post, upper.pre.to(lower.post.device))
        ):
            proof.stream_is_unbroken = False


def _check_stack(stack: Stack, proof: StackProof, tolerance: float) -> None:
    absent = sorted(set(range(len(stack.layers))) - set(proof.rules))
    if absent:
        raise ModelError(
            f"{stack.name}: attention of only {len(proof.rules)} of {len(stack.layers)} layers can be seen; "
            f"not {', '.join(map(str, absent[:8]))}.",
            "They attend by code of their own; this architecture needs an adapter.",
        )
    if proof.output_error > tolerance or proof.row_sum_error > tolerance:
        raise CaptureError(
            f"{stack.name}: attention rebuilt from q and k is off by {proof.output_error:.2g} of its output, "
            f"rows sum to 1 within {proof.row_sum_error:.2g} (allowed: {tolerance:.0e}).",
            "Its attention does something that q, k and the mask rule do not hold; report this model.",
        )


def _report(stack: Stack, proof: StackProof) -> dict[str, Any]:
    return {
        "path": stack.path,
        "taps": len(proof.rules),
        "row_sum_error": proof.row_sum_error,
        "attention_output_error": proof.output_error,
        "halves": None if proof.halves is None else proof.halves.definition,
        "halves_error": proof.halves_error,
        "resid_post_is_next_resid_pre": proof.stream_is_unbroken,
        "masks": sorted({rule.mask for rule in proof.rules.values()}),
    }


def _largest(first: Any, second: Any) -> float:
    if first is None or second is None:
        return 0.0
    return float(np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30))
