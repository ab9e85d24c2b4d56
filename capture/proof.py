"""What is proven about a model before anything of it is kept, on the first sample of the dataset.

It costs three forwards of that one sample: one as the model is, one observed, and one more as it is, to see
that nothing was left behind; and one for each attention that is kept, with one of its rows edited.
What was proven, and how exactly, goes into the run's attribute `proven`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechanistic.store.errors import CaptureError, ModelError

from .anatomy import CROSS, Anatomy, Stack
from .batch import Batch
from .coordinates_square import vision_config
from .encoder_masks import EncoderMasks, encoder_rule
from .forward import run_forward
from .mask_rules import MaskRule, describe, find_cross_rule, find_rule
from .models import LoadedModel
from .output_projection import OutputProjection, ProjectionProbe, projection_problem
from .rebuilt_attention import check_shape, rebuild
from .residual import Halves, LayerProbe
from .tap import AttentionCall, tapped

# Share of the largest value by which a rebuilt tensor may differ from the model's own.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass
class StackProof:
    """What one forward showed about one stack, or about the cross-attention of one."""

    rules: dict[int, MaskRule] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    halves: Halves | None = None
    row_sum_error: float = 0.0
    output_error: float = 0.0
    edit_change: float = 0.0
    halves_error: float | None = None
    stream_is_unbroken: bool = True
    projections: Mapping[int, OutputProjection] = field(default_factory=dict)
    projection_problem: str | None = None


@dataclass(frozen=True)
class Proof:
    """Stacks, and cross-attentions (``text/x``), by name; `attributes` is what the run keeps of it."""

    stacks: Mapping[str, StackProof]
    attributes: Mapping[str, Any]

    @property
    def rules(self) -> dict[str, dict[int, MaskRule]]:
        """Mask rule by attention and layer."""
        return {name: stack.rules for name, stack in self.stacks.items()}

    @property
    def halves(self) -> dict[str, Halves | None]:
        """The children that add up to each layer, by stack."""
        return {name: stack.halves for name, stack in self.stacks.items()}


def prove(loaded: LoadedModel, batch: Batch, attention: Collection[str]) -> Proof:
    """Attach to the model on one small batch and check that what will be stored is what the model does.

    Parameters
    ----------
    attention
        The attentions that will be kept, such as ``text`` or ``text/x``; of other stacks only the residual
        stream is looked at.

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
    begun = time.monotonic()
    tolerance = TOLERANCE[loaded.dtype]
    before = outcome(loaded.model, batch)
    stacks, observed = _observe(loaded, batch, attention, tolerance)
    after = outcome(loaded.model, batch)
    change = _largest(before, observed)
    left_behind = _largest(before, after)
    if change > tolerance or left_behind > tolerance:
        raise CaptureError(
            f"Observing this model changes its logits by {change:.2g}, and leaves {left_behind:.2g} changed.",
            'Load it with attn_implementation="eager" or in float32, or report this model.',
        )
    for name in attention:
        _check_layers(loaded.anatomy, name, stacks[name], tolerance)
        stacks[name].edit_change = _largest(before, _edited(loaded, batch, name))
        if not stacks[name].edit_change > 0:
            raise CaptureError(
                f"{name}: replacing attention rows of its first layer changes nothing in the end.",
                "The model does not use what is seen of its attention; report this model.",
            )
    report = {
        name: _report(loaded.anatomy.of(name), stack, cross=name.endswith(CROSS))
        for name, stack in stacks.items()
    }
    attributes = {
        "tolerance": tolerance,
        "logits_change": change,
        "forwards": 3 + len(attention),
        "seconds": round(time.monotonic() - begun, 3),
        "stacks": report,
    }
    return Proof(stacks, attributes)


def outcome(model: Any, batch: Batch) -> np.ndarray[Any, Any]:
    """What a forward comes to: the logits; of models without any, similarities or the last hidden state."""
    output, _ = run_forward(model, batch)
    names = ("logits", "logits_per_image", "itm_score", "last_hidden_state")
    found: Tensor | None = next((output[name] for name in names if output.get(name) is not None), None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} returns none of {', '.join(names)}, by which a change could be seen.",
            "Load it as another class of the library, such as AutoModel.",
        )
    result: np.ndarray[Any, Any] = found.float().cpu().numpy()
    return result


def _edited(loaded: LoadedModel, batch: Batch, name: str) -> np.ndarray[Any, Any]:
    """Logits where one query of its first layer attends to nothing but the first key.

    The query is the last prompt token; of an encoder, the last patch of its first segment; of a Q-Former, the
    first of its learned queries.
    """
    layer_of = loaded.anatomy.module_layers([name])
    first = min(layer for _, layer in layer_of.values())
    edited: list[int] = []

    def edit(call: AttentionCall) -> None:
        if call.module in layer_of and layer_of[call.module][1] == first and not edited:
            query = _edited_query(loaded.anatomy.of(name), batch, call)
            values = call.value[0, :, 0].repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=0)
            # The call shows the very output that the model goes on with.
            call.output[0, query] = values
            edited.append(query)

    with tapped(loaded.model, edit):
        return outcome(loaded.model, batch)


def _edited_query(stack: Stack, batch: Batch, call: AttentionCall) -> int:
    if stack.is_encoder:
        patches = np.flatnonzero(batch.encoder[0]["patch_row"][: call.query.shape[2]] >= 0)
        return int(patches[-1])
    return int(batch.last_prompt[0]) if stack.name == "text" else 0


def _observe(
    loaded: LoadedModel, batch: Batch, attention: Collection[str], tolerance: float
) -> tuple[dict[str, StackProof], np.ndarray[Any, Any]]:
    anatomy = loaded.anatomy
    seen = [name for name, stack in anatomy.stacks.items() if not stack.is_encoder or any(batch.images)]
    stacks = {name: StackProof() for name in [*seen, *sorted(each for each in attention if CROSS in each)]}
    layer_of = anatomy.module_layers(attention)
    probes = {name: [LayerProbe(layer, tolerance) for layer in anatomy.stack(name).layers] for name in seen}
    encoder = EncoderMasks(batch.encoder)
    decoder = anatomy.stack("text").layers if "text" in attention else ()
    projections = [ProjectionProbe(layer, tolerance) for layer in decoder]

    def attended(call: AttentionCall) -> None:
        if call.module not in layer_of:
            return
        name, layer = layer_of[call.module]
        stack, proof = anatomy.of(name), stacks[name]
        if name == "text":
            projections[layer].attended(call.output)
        check_shape(call, stack, f"{name}.{layer}")
        lengths = [call.query.shape[2]] * call.query.shape[0]
        if stack.is_encoder:
            rule = encoder_rule(vision_config(loaded.model), layer)
            encoder.check(rule, call, layer, name)
        elif name.endswith(CROSS):
            rule = find_cross_rule(call, batch.table("xq"), batch.table("xk"), f"{name}.{layer}")
        else:
            rule = _sample_rule(call, name, layer, proof, batch)
            lengths = [len(layout) for layout in batch.layouts(name)]
        proof.rules[layer] = rule
        proof.attention[str(layer)] = describe(rule, call)
        row_sum_error, output_error = rebuild(call, stack, lengths)
        proof.row_sum_error = max(proof.row_sum_error, row_sum_error)
        proof.output_error = max(proof.output_error, output_error)

    with ExitStack() as watching:
        watching.enter_context(tapped(loaded.model, attended))
        for probe in (probe for each in probes.values() for probe in each):
            watching.enter_context(probe.watching())
        for projection in projections:
            watching.enter_context(projection.watching())
        logits = outcome(loaded.model, batch)
    for name, each in probes.items():
        _join_halves(anatomy.stack(name), stacks[name], each)
    if projections:
        _join_projections(stacks["text"], projections)
    return stacks, logits


def _sample_rule(call: AttentionCall, name: str, layer: int, proof: StackProof, batch: Batch) -> MaskRule:
    if layer in proof.rules:
        raise ModelError(
            f"{name}.{layer}: attention is computed more than once in a forward.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    rule = find_rule(call, batch.layouts(name), f"{name}.{layer}")
    if name == "text" and rule.mask == "bidirectional" and any(batch.answers):
        raise CaptureError(
            f"text.{layer}: the prompt attends to the answer, which was not there when it was generated.",
            "This architecture needs an adapter; until it has one, use --max-new-tokens 0.",
        )
    return rule


def _join_halves(stack: Stack, proof: StackProof, probes: list[LayerProbe]) -> None:
    widths = {probe.post.shape[-1] for probe in probes if probe.post is not None}
    if widths - {stack.width}:
        raise ModelError(
            f"{stack.name}: its layers give {sorted(widths)} numbers a token, its configuration says "
            f"{stack.width}.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    known = [probe.found for probe in probes if probe.found is not None]
    if len(known) == len(probes):
        proof.halves = Halves.of_layers([halves for halves, _ in known])
        proof.halves_error = max(error for _, error in known)
    for lower, upper in pairwise(probes):
        # Layers may be on different devices.
        if (
            lower.post is None
            or upper.pre is None
            or not torch.equal(lower.post, upper.pre.to(lower.post.device))
        ):
            proof.stream_is_unbroken = False


def _join_projections(proof: StackProof, probes: list[ProjectionProbe]) -> None:
    problems = [
        projection_problem(probe, None if proof.halves is None else proof.halves.at(layer))
        for layer, probe in enumerate(probes)
        if layer in proof.rules
    ]
    proof.projection_problem = next((problem for problem in problems if problem is not None), None)
    proof.projections = {layer: probe.found for layer, probe in enumerate(probes) if probe.found is not None}


def _check_layers(anatomy: Anatomy, name: str, proof: StackProof, tolerance: float) -> None:
    expected = anatomy.of(name).attending(cross=name.endswith(CROSS))
    absent = sorted(set(expected) - set(proof.rules))
    if absent:
        raise ModelError(
            f"{name}: attention of only {len(proof.rules)} of {len(expected)} layers can be seen; "
            f"not {', '.join(map(str, absent[:8]))}.",
            "They attend by code of their own; this architecture needs an adapter.",
        )
    if proof.output_error > tolerance or proof.row_sum_error > tolerance:
        raise CaptureError(
            f"{name}: attention rebuilt from q and k is off by {proof.output_error:.2g} of its output, "
            f"rows sum to 1 within {proof.row_sum_error:.2g} (allowed: {tolerance:.0e}).",
            "Its attention does something that q, k and the mask rule do not hold; report this model.",
        )


def _report(stack: Stack, proof: StackProof, *, cross: bool) -> dict[str, Any]:
    attention = {
        "path": stack.path,
        "taps": len(proof.rules),
        "row_sum_error": proof.row_sum_error,
        "attention_output_error": proof.output_error,
        "logits_change_by_edited_row": proof.edit_change,
        "masks": sorted({rule.mask for rule in proof.rules.values()}),
    }
    if cross:
        return attention
    return {
        **attention,
        "halves": None if proof.halves is None else proof.halves.definition,
        "halves_error": proof.halves_error,
        "resid_post_is_next_resid_pre": proof.stream_is_unbroken,
    }


def _largest(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    return float(np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30))
