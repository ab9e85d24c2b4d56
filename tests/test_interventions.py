"""Edits at every site: no change is nothing, a whole change is the other input, and all of it comes off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from zoo import ZOO, samples

from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.interventions import (
    ATTENTION_EDITS,
    EDITED_SITES,
    Add,
    CloseKeys,
    Edit,
    ProjectOut,
    ReplaceRows,
    Scale,
    ScaleScores,
    intervening,
    replace_rows,
)
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.proof import prove
from mechanistic.capture.residual import Halves
from mechanistic.capture.tap import NAME, AttentionCall, attention_configs, tapped
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import CaptureError, ModelError, SpecificationError

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "gemma3", "gpt2", "blip2")
# Of BLIP-2's query former, whose norms are behind the sums, not every site is defined.
STACKS = {name: [stack for stack in ZOO[name].layers if ZOO[name].halves_of(stack)] for name in FAMILIES}
CASES = [(name, stack, site) for name in FAMILIES for stack in STACKS[name] for site in EDITED_SITES]
# Of Qwen's encoder, which attends in pieces, weights cannot be edited.
IN_PIECES = {("qwen2_5_vl", "vision", "scores"), ("qwen2_5_vl", "vision", "pattern")}


@dataclass(frozen=True)
class Case:
    loaded: LoadedModel
    batch: Batch
    halves: Mapping[str, Halves | None]
    plain: Tensor


@cache
def case(name: str) -> Case:
    family = ZOO[name]
    loaded = family.build()
    texts = TokenTexts(loaded.tokenizer)
    batch = prepare_batch(loaded, samples(family)[1:3], 0, max_new_tokens=0, texts=texts)
    halves = prove(loaded, batch, set(family.layers)).halves
    return Case(loaded, batch, halves, forward(loaded, batch))


def forward(loaded: LoadedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = loaded.model(**batch.inputs, use_cache=False).logits
    return logits


def edited(it: Case, *edits: Edit) -> Tensor:
    with intervening(it.loaded, edits, it.halves):
        return forward(it.loaded, it.batch)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("name", "stack", "site"), CASES)
def test_intervening__an_edit_that_changes_nothing_is_nothing(name: str, stack: str, site: str) -> None:
    it = case(name)
    shapes: list[tuple[int, ...]] = []

    def same(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor.clone()

    if (name, stack, site) in IN_PIECES:
        with pytest.raises(ModelError, match="in pieces"):
            edited(it, Edit(stack, 0, site, same))
        return
    got = edited(it, Edit(stack, 1, site, same))
    # Weights go through the formula in the kernel's place.
    exact = site not in ("scores", "pattern")
    torch.testing.assert_close(got, it.plain, rtol=0, atol=0 if exact else 1e-5)
    torch.testing.assert_close(forward(it.loaded, it.batch), it.plain, rtol=0, atol=0)
    own = it.loaded.anatomy.stack(stack)
    assert all(len(shape) == (4 if site in ATTENTION_EDITS else 3) for shape in shapes)
    width = own.head_width if site in ("q", "k", "v", "z") else own.width
    assert site in ("scores", "pattern") or shapes[0][-1] == width


@pytest.mark.parametrize(("name", "stack", "site"), [each for each in CASES if each not in IN_PIECES])
def test_intervening__every_edit_moves_the_logits(name: str, stack: str, site: str) -> None:
    it = case(name)
    torch.manual_seed(0)
    got = edited(it, Edit(stack, 0, site, lambda tensor: tensor + torch.randn_like(tensor)))
    assert float((got - it.plain).abs().max()) > 1e-3
    torch.testing.assert_close(forward(it.loaded, it.batch), it.plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_intervening__what_a_half_adds_is_added_to_the_stream(name: str) -> None:
    it = case(name)
    for stack in STACKS[name]:
        torch.manual_seed(1)
        step = torch.randn(it.loaded.anatomy.stack(stack).width)
        results = {site: edited(it, Edit(stack, 0, site, Add(step))) for site in EDITED_SITES[-4:]}
        torch.testing.assert_close(results["attn_out"], results["resid_mid"], rtol=0, atol=2e-5)
        torch.testing.assert_close(results["mlp_out"], results["resid_post"], rtol=0, atol=2e-5)
        assert float((results["attn_out"] - results["mlp_out"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_intervening__edits_of_a_layer_meet_in_the_order_of_the_forward(name: str) -> None:
    """Given in any order: the middle of the stream sees what attention's edit added, the end both."""
    it = case(name)
    for stack in STACKS[name]:
        seen: dict[str, Tensor] = {}

        def keep(site: str, stack: str = stack, seen: dict[str, Tensor] = seen) -> Edit:
            return Edit(stack, 0, site, lambda tensor: seen.setdefault(site, tensor))

        edited(it, keep("resid_mid"), keep("resid_post"), keep("mlp_out"))
        before = dict(seen)
        seen.clear()
        step = torch.full((it.loaded.anatomy.stack(stack).width,), 0.5)
        order = (
            keep("resid_post"),
            keep("resid_mid"),
            keep("mlp_out"),
            Edit(stack, 0, "attn_out", Add(step)),
        )
        edited(it, *order)
        torch.testing.assert_close(seen["resid_mid"], before["resid_mid"] + step, rtol=0, atol=2e-5)
        total = seen["resid_mid"] + seen["mlp_out"]
        torch.testing.assert_close(seen["resid_post"], total, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_intervening__closed_keys_are_those_of_a_changed_pattern(name: str) -> None:
    it = case(name)
    calls: list[AttentionCall] = []
    inside = set(it.loaded.anatomy.stack("text").layers[0].modules())
    with tapped(it.loaded.model, lambda call: calls.append(call) if call.module in inside else None):
        forward(it.loaded, it.batch)
    pattern = calls[0].pattern()
    closed = torch.zeros_like(pattern, dtype=torch.bool)
    query = int(it.batch.last_prompt[0])
    closed[0, 1, query, 1 : query - 1] = True
    renewed = pattern.masked_fill(closed, 0)
    renewed = renewed / renewed.sum(-1, keepdim=True).clamp_min(1e-30)
    got = edited(it, Edit("text", 0, "scores", CloseKeys(closed)))
    expected = edited(it, Edit("text", 0, "pattern", lambda _: renewed))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    mixed = renewed @ calls[0].value.repeat_interleave(pattern.shape[1] // calls[0].value.shape[1], 1)
    through_z = edited(it, Edit("text", 0, "z", lambda _: mixed.transpose(1, 2)))
    torch.testing.assert_close(got, through_z, rtol=0, atol=1e-5)
    other = 1 if len(it.plain) > 1 else 0
    torch.testing.assert_close(got[other], it.plain[other], rtol=0, atol=1e-5)


def test_intervening__a_query_without_keys_attends_to_nothing() -> None:
    it = case("llava")
    shape = (len(it.plain), 1, it.plain.shape[1], it.plain.shape[1])
    everything = Edit("text", 0, "scores", CloseKeys(torch.ones(shape, dtype=torch.bool)))
    nothing = Edit("text", 0, "z", Scale(0.0))
    torch.testing.assert_close(edited(it, everything), edited(it, nothing), rtol=0, atol=1e-6)


def test_intervening__scaled_scores_stay_behind_the_mask() -> None:
    it = case("llava")
    calls: list[AttentionCall] = []
    size = it.plain.shape[1]
    chosen = torch.zeros(1, 1, size, size, dtype=torch.bool)
    chosen[..., 2:9] = True
    with tapped(it.loaded.model, lambda call: calls.append(call)):
        edited(it, Edit("text", 0, "scores", ScaleScores(chosen, 0.0)))
    call = calls[-2]
    weights = call.pattern()[0, 0]
    assert float(weights.triu(1).abs().max()) == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(size))
    torch.testing.assert_close(weights[40, 2:9], weights[40, 2].expand(7))


def test_intervening__all_rows_of_another_input_are_that_input() -> None:
    it = case("llava")
    family = ZOO["llava"]
    kept: list[Tensor] = []
    spread = (torch.arange(len(it.plain))[:, None], torch.arange(it.plain.shape[1])[None])
    edited(it, Edit("text", 1, "resid_pre", lambda tensor: kept.append(tensor.clone()) or tensor))
    flipped = ReplaceRows(spread, kept[0].flip(0))
    got = edited(it, Edit("text", 1, "resid_pre", flipped))
    assert family.sees
    lengths = [len(sequence) for sequence in it.batch.sequences]
    shortest = min(lengths)
    torch.testing.assert_close(got[0, :shortest], it.plain[1, :shortest], rtol=0, atol=1e-5)


def test_intervening__gradients_flow_through_edits() -> None:
    it = case("llava")
    step = torch.zeros(it.loaded.anatomy.stack("text").width, requires_grad=True)
    where = (torch.tensor([0]), torch.tensor([3]))
    edits = [
        Edit("text", 0, "resid_post", Add(step, where=where)),
        Edit("text", 1, "pattern", lambda p: p * 1),
    ]
    with intervening(it.loaded, edits, it.halves):
        logits = it.loaded.model(**it.batch.inputs, use_cache=False).logits
    logits[0, int(it.batch.last_prompt[0]), 5].backward()
    assert step.grad is not None
    moved = step.grad * 1e-2 / step.grad.norm()
    with torch.no_grad():
        change = edited(it, Edit("text", 0, "resid_post", Add(moved, where=where))) - it.plain
    expected = float(step.grad.norm()) * 1e-2
    got = float(change[0, int(it.batch.last_prompt[0]), 5])
    assert got == pytest.approx(expected, rel=0.1)


def test_intervening__an_exception_leaves_nothing_behind() -> None:
    it = case("internvl")
    before = hooks(it.loaded.model)

    def fail(tensor: Tensor) -> Tensor:
        raise RuntimeError("mine")

    for site in EDITED_SITES:
        with pytest.raises(RuntimeError, match="mine"):
            edited(it, Edit("text", 1, site, fail))
        assert hooks(it.loaded.model) == before
        torch.testing.assert_close(forward(it.loaded, it.batch), it.plain, rtol=0, atol=0)
    assert all(config._attn_implementation != NAME for config in attention_configs(it.loaded.model))


def test_intervening__says_what_is_wrong() -> None:
    it = case("llava")
    with pytest.raises(SpecificationError, match=r"no site 'zz' to edit.*\n.*resid_pre"):
        edited(it, Edit("text", 0, "zz", lambda t: t))
    with pytest.raises(SpecificationError, match=r"no layer 9 in the text stack: it has 2"):
        edited(it, Edit("text", 9, "z", lambda t: t))
    with pytest.raises(ModelError, match=r"no qformer stack"):
        edited(it, Edit("qformer", 0, "z", lambda t: t))
    with pytest.raises(ModelError, match=r"'text.*.attn_out' is not defined"):
        edited(Case(it.loaded, it.batch, {}, it.plain), Edit("text", 0, "attn_out", lambda t: t))
    with pytest.raises(CaptureError, match=r"text.0.z makes .* of .*\n.*returns a tensor of the shape"):
        edited(it, Edit("text", 0, "z", lambda t: t[..., :1]))
    with (
        pytest.raises(CaptureError, match=r"1 of 1 edits were never applied: text.0.z did not come by"),
        intervening(it.loaded, [Edit("text", 0, "z", lambda t: t)], it.halves),
    ):
        pass


def test_edits__do_what_their_formulas_say() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    where = (torch.tensor([1]), torch.tensor([2]))
    direction = torch.tensor([0.0, 2.0, 0.0, 0.0])
    replaced = replace_rows(tensor, where, torch.zeros(4))
    assert replaced[1, 2].tolist() == [0, 0, 0, 0]
    assert tensor[1, 2].tolist() == [20, 21, 22, 23]
    assert torch.equal(replaced[0], tensor[0])
    assert Add(direction, 0.5, where)(tensor)[1, 2].tolist() == [20, 22, 22, 23]
    assert Add(direction)(tensor)[0, 0].tolist() == [0, 3, 2, 3]
    assert ProjectOut(direction, where=where)(tensor)[1, 2].tolist() == [20, 0, 22, 23]
    assert ProjectOut(direction, 0.5)(tensor)[1, 2].tolist() == [20, 10.5, 22, 23]
    assert Scale(0.0, where)(tensor)[1, 2].tolist() == [0, 0, 0, 0]
    assert Scale(2.0)(tensor)[0, 0].tolist() == [0, 2, 4, 6]
