"""Mask rules: what they allow, that a model's own mask finds its rule, and that another mask is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import llava, samples
from transformers import MistralConfig, MistralForCausalLM

from mechanistic.analysis.mask_rules import AttentionRule
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.mask_rules import MaskRule, SequenceLayout, check_rule, describe, find_rule
from mechanistic.capture.tap import AttentionCall, tapped
from mechanistic.capture.token_table import TokenTexts, sequence_layout
from mechanistic.store.errors import CaptureError

# One text token, an image of two tokens, text, an image of three, text, two answer tokens.
LAYOUT = SequenceLayout(np.array([-1, 1, 1, -1, 2, 2, 2, -1, -1, -1], np.int16), 8)
RULES = [
    MaskRule("causal"),
    MaskRule("bidirectional"),
    MaskRule("prefix"),
    MaskRule("causal_image_blocks"),
    MaskRule("sliding_window", 3),
    MaskRule("sliding_window_image_blocks", 2),
]


def call(mask: torch.Tensor | None, *, causal: bool = True, window: int | None = None) -> AttentionCall:
    size = len(LAYOUT) if mask is None else mask.shape[-1]
    tensor = torch.zeros(1 if mask is None else mask.shape[0], 2, size, 4)
    return AttentionCall(
        module=torch.nn.Identity(),
        query=tensor,
        key=tensor,
        value=tensor,
        output=tensor.transpose(1, 2),
        mask=mask,
        scale=0.5,
        softcap=None,
        window=window,
        sinks=None,
        position_bias=None,
        causal=causal,
    )


def tensor(mask: NDArray[np.bool_]) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None]


def test_allowed__by_hand() -> None:
    layout = SequenceLayout(np.array([-1, 1, 1, -1], np.int16), 3)
    by_hand = {
        MaskRule("causal"): "1000 1100 1110 1111",
        MaskRule("prefix"): "1110 1110 1110 1111",
        MaskRule("causal_image_blocks"): "1000 1110 1110 1111",
        MaskRule("sliding_window", 2): "1000 1100 0110 0011",
        MaskRule("sliding_window_image_blocks", 1): "1000 0110 0010 0001",
    }
    for rule, text in by_hand.items():
        expected = np.array([[int(cell) for cell in row] for row in text.split()], bool)
        np.testing.assert_array_equal(rule.allowed(layout), expected, err_msg=str(rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_allowed__is_what_the_analyses_rebuild(rule: MaskRule) -> None:
    image = LAYOUT.blocks >= 0
    columns = {
        "position": np.arange(len(LAYOUT)),
        "kind": np.where(image, 1, np.where(np.arange(len(LAYOUT)) < LAYOUT.prompt_length, 0, 3)),
        "image_index": np.where(image, LAYOUT.blocks - 1, -1),
    }
    reader = AttentionRule.parse(describe(rule, call(None)), "here")
    np.testing.assert_array_equal(rule.allowed(LAYOUT), reader.allowed(columns, columns))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_find_rule__finds_the_rule_of_its_mask(rule: MaskRule) -> None:
    mask = tensor(rule.allowed(LAYOUT))
    assert find_rule(call(mask, window=rule.window), [LAYOUT], "text.0") == rule


def test_find_rule__reads_additive_and_absent_masks() -> None:
    allowed = tensor(MaskRule("causal").allowed(LAYOUT))
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    assert find_rule(call(additive), [LAYOUT], "text.0").mask == "causal"
    assert find_rule(call(None, causal=True), [LAYOUT], "text.0").mask == "causal"
    assert find_rule(call(None, causal=False), [LAYOUT], "text.0").mask == "bidirectional"


def test_find_rule__ignores_padding_on_the_right() -> None:
    mask = tensor(np.tri(len(LAYOUT) + 3, dtype=bool))
    mask[..., len(LAYOUT) :] = False
    assert find_rule(call(mask), [LAYOUT], "text.0").mask == "causal"


def test_find_rule__an_unknown_mask_is_an_error() -> None:
    odd = MaskRule("causal").allowed(LAYOUT)
    odd[7, 2] = False
    with pytest.raises(CaptureError, match=r"text\.3: no mask rule explains its mask"):
        find_rule(call(tensor(odd)), [LAYOUT], "text.3")


def test_find_rule__a_mask_that_differs_by_head_is_an_error() -> None:
    both = torch.cat(
        [tensor(MaskRule("causal").allowed(LAYOUT)), tensor(MaskRule("prefix").allowed(LAYOUT))], 1
    )
    with pytest.raises(CaptureError, match="differs from head to head"):
        find_rule(call(both), [LAYOUT], "text.0")


def test_check_rule__a_batch_that_breaks_the_rule_is_an_error() -> None:
    mask = tensor(MaskRule("prefix").allowed(LAYOUT))
    check_rule(MaskRule("prefix"), call(mask), [LAYOUT], "text.0")
    with pytest.raises(CaptureError, match="is not 'causal'"):
        check_rule(MaskRule("causal"), call(mask), [LAYOUT], "text.0")


def test_find_rule__on_a_llava_is_causal_and_bidirectional() -> None:
    loaded = llava()
    batch = prepare_batch(loaded, samples(3), 0, max_new_tokens=2, texts=TokenTexts(loaded.tokenizer))
    layouts = [sequence_layout(columns) for columns in batch.decoder]
    calls: list[AttentionCall] = []
    with torch.no_grad(), tapped(loaded.model, calls.append):
        loaded.model(**batch.inputs)
    none = SequenceLayout(np.full(65, -1, np.int16), 65)
    assert {find_rule(each, [none] * 3, "vision").mask for each in calls[:2]} == {"bidirectional"}
    assert {find_rule(each, layouts, "text").mask for each in calls[2:]} == {"causal"}


@pytest.mark.parametrize("length", [4, 12])
def test_find_rule__on_a_sliding_window_model_names_the_window_even_on_a_short_prompt(length: int) -> None:
    config = MistralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=5,
    )
    model: Any = MistralForCausalLM(config)
    calls: list[AttentionCall] = []
    with torch.no_grad(), tapped(model, calls.append):
        model(input_ids=torch.arange(length)[None])
    layout = SequenceLayout(np.full(length, -1, np.int16), length)
    assert find_rule(calls[0], [layout], "text.0") == MaskRule("sliding_window", 5)
