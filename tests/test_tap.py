"""The attention tap: logits stay as they were, what it shows is what was attended with, nothing is left."""

from __future__ import annotations

from contextvars import Context
from typing import Any

import pytest
import torch
from tiny_models import llava, samples
from torch import Tensor

from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.tap import NAME, AttentionCall, Tap, attention_configs, tapped
from mechanistic.capture.token_table import TokenTexts


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def batch(loaded: LoadedModel) -> Batch:
    texts = TokenTexts(loaded.tokenizer)
    return prepare_batch(loaded, samples(3), 0, max_new_tokens=2, texts=texts)


def forward(loaded: LoadedModel, batch: Batch, **options: Any) -> Any:
    with torch.no_grad():
        return loaded.model(**batch.inputs, use_cache=False, **options)


def implementations(loaded: LoadedModel) -> list[str]:
    return [config._attn_implementation for config in attention_configs(loaded.model)]


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_tapped__leaves_logits_bit_identical(loaded: LoadedModel, batch: Batch, own: str) -> None:
    loaded.model.set_attn_implementation(own)
    try:
        plain = forward(loaded, batch).logits
        with tapped(loaded.model, lambda call: None):
            observed = forward(loaded, batch).logits
        torch.testing.assert_close(observed, plain, rtol=0, atol=0)
        torch.testing.assert_close(forward(loaded, batch).logits, plain, rtol=0, atol=0)
    finally:
        loaded.model.set_attn_implementation("sdpa")


def test_tapped__leaves_logits_bit_identical_without_padding(loaded: LoadedModel) -> None:
    one = prepare_batch(loaded, samples(1), 0, max_new_tokens=2, texts=TokenTexts(loaded.tokenizer))
    plain = forward(loaded, one).logits
    masks: list[Tensor | None] = []
    with tapped(loaded.model, lambda call: masks.append(call.mask)):
        observed = forward(loaded, one).logits
    torch.testing.assert_close(observed, plain, rtol=0, atol=0)
    # sdpa got no mask here, and yet the observer sees the causal one.
    assert masks[-1] is not None
    assert torch.equal(masks[-1][0, 0], torch.ones_like(masks[-1][0, 0]).tril())


def test_tapped__shows_every_layer_of_every_stack_once(loaded: LoadedModel, batch: Batch) -> None:
    seen: list[torch.nn.Module] = []
    with tapped(loaded.model, lambda call: seen.append(call.module)):
        forward(loaded, batch)
    expected = [
        layer.self_attn for stack in ("vision", "text") for layer in loaded.anatomy.stack(stack).layers
    ]
    assert seen == expected


def test_tapped__rebuilt_patterns_are_eager_attention(loaded: LoadedModel, batch: Batch) -> None:
    calls: list[AttentionCall] = []
    with tapped(loaded.model, calls.append):
        forward(loaded, batch)
    loaded.model.set_attn_implementation("eager")
    try:
        reference = forward(loaded, batch, output_attentions=True).attentions
    finally:
        loaded.model.set_attn_implementation("sdpa")
    valid = batch.inputs["attention_mask"].bool()
    for call, weights in zip(calls[-len(reference) :], reference, strict=True):
        rows = call.pattern().transpose(1, 2)[valid]
        torch.testing.assert_close(rows, weights.transpose(1, 2)[valid], rtol=0, atol=1e-5)


def test_tapped__restores_the_model_after_an_exception(loaded: LoadedModel, batch: Batch) -> None:
    before = implementations(loaded)

    def fail(call: AttentionCall) -> None:
        raise RuntimeError("observer")

    with tapped(loaded.model, fail):
        assert set(implementations(loaded)) == {NAME}
        with pytest.raises(RuntimeError, match="observer"):
            forward(loaded, batch)
    assert implementations(loaded) == before
    with pytest.raises(RuntimeError, match="outside"), tapped(loaded.model, fail):
        raise RuntimeError("outside")
    assert implementations(loaded) == before
    forward(loaded, batch)


def test_tapped__nests(loaded: LoadedModel, batch: Batch) -> None:
    outer: list[AttentionCall] = []
    inner: list[AttentionCall] = []
    plain = forward(loaded, batch).logits
    with tapped(loaded.model, outer.append):
        with tapped(loaded.model, inner.append):
            observed = forward(loaded, batch).logits
        assert set(implementations(loaded)) == {NAME}
        forward(loaded, batch)
    assert len(outer) == 2 * len(inner)
    torch.testing.assert_close(observed, plain, rtol=0, atol=0)
    assert NAME not in implementations(loaded)


def test_tap__comes_off_in_any_order_and_twice(loaded: LoadedModel, batch: Batch) -> None:
    before = implementations(loaded)
    calls: list[AttentionCall] = []
    first, second = Tap(loaded.model, lambda call: None), Tap(loaded.model, calls.append)
    first.remove()
    first.remove()
    forward(loaded, batch)
    assert len(calls) == 5
    second.remove()
    assert implementations(loaded) == before
    forward(loaded, batch)
    assert len(calls) == 5


def test_tap__sees_forwards_of_other_contexts(loaded: LoadedModel, batch: Batch) -> None:
    """A cell of a notebook, or a thread, that runs the model need not be the one that attached the tap."""
    calls: list[AttentionCall] = []
    tap = Context().run(Tap, loaded.model, calls.append)
    Context().run(forward, loaded, batch)
    Context().run(tap.remove)
    assert len(calls) == 5
    assert NAME not in implementations(loaded)


def test_tap__does_not_undo_a_choice_made_meanwhile(loaded: LoadedModel) -> None:
    tap = Tap(loaded.model, lambda call: None)
    loaded.model.set_attn_implementation("eager")
    tap.remove()
    assert set(implementations(loaded)) == {"eager"}
    loaded.model.set_attn_implementation("sdpa")
