"""Which keys a query may look at: every rule by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mechanistic.analysis.mask_rules import AttentionRule, read_rules
from mechanistic.store.errors import FormatError
from mechanistic.store.schema import KIND, MASKS

# <s>, two image tokens, a word, two image tokens of a second image, a word, the answer
NAMES = ["special", "image", "image", "text", "image", "image", "text", "answer"]
TOKENS: dict[str, np.ndarray[Any, Any]] = {
    "position": np.arange(8),
    "kind": np.array([KIND[name] for name in NAMES]),
    "image_index": np.array([-1, 0, 0, -1, 1, 1, -1, -1]),
    "tile": np.array([-1, 0, 0, -1, 0, 0, -1, -1]),
    "patch_row": np.array([-1, 0, 0, -1, 0, 0, -1, -1]),
    "patch_col": np.array([-1, 0, 1, -1, 0, 1, -1, -1]),
    "first_query": np.array([1, 1, 1, -1, 4, 4, -1, -1]),
}
LOWER = ["10000000", "11000000", "11100000", "11110000", "11111000", "11111100", "11111110", "11111111"]
EXPECTED = {
    "causal": LOWER,
    "bidirectional": ["11111111"] * 8,
    "cross": ["11111111"] * 8,
    "prefix": ["11111110"] * 7 + ["11111111"],
    "causal_image_blocks": [
        "10000000",
        "11100000",
        "11100000",
        "11110000",
        "11111100",
        "11111100",
        "11111110",
        "11111111",
    ],
    "sliding_window": [
        "10000000",
        "11000000",
        "01100000",
        "00110000",
        "00011000",
        "00001100",
        "00000110",
        "00000011",
    ],
    "sliding_window_image_blocks": [
        "10000000",
        "11100000",
        "01100000",
        "00110000",
        "00011100",
        "00001100",
        "00000110",
        "00000011",
    ],
    "per_image": [
        "10000000",
        "01100000",
        "01100000",
        "00010000",
        "00001100",
        "00001100",
        "00000011",
        "00000011",
    ],
    "padded_image": [
        "00000000",
        "01100000",
        "01100000",
        "00000000",
        "00001100",
        "00001100",
        "00000000",
        "00000000",
    ],
    "cross_from": ["11111111"] + ["11100000"] * 3 + ["11101100"] * 4,
    "image_windows": [
        "10000000",
        "01100000",
        "01100000",
        "00010000",
        "00001100",
        "00001100",
        "00000011",
        "00000011",
    ],
}
WINDOW = {"sliding_window": 2, "sliding_window_image_blocks": 2, "image_windows": 2}

HEADS = np.arange(4)


def rule(mask: str) -> AttentionRule:
    return AttentionRule.parse({"mask": mask, "scale": 0.5, "window": WINDOW.get(mask)}, "text/q, layer 0")


@pytest.mark.parametrize("mask", MASKS)
def test_rule__by_hand(mask: str) -> None:
    allowed = rule(mask).allowed(TOKENS, TOKENS)
    assert ["".join("01"[int(cell)] for cell in row) for row in allowed] == EXPECTED[mask]


@pytest.mark.parametrize("mask", MASKS)
def test_rule__of_a_few_queries_is_those_rows(mask: str) -> None:
    few = {name: values[[2, 5]] for name, values in TOKENS.items()}
    every = rule(mask).allowed(TOKENS, TOKENS)
    np.testing.assert_array_equal(rule(mask).allowed(few, TOKENS), every[[2, 5]])
    assert not every[[2, 5], rule(mask).key_stop(few, TOKENS) :].any(), "no allowed key is cut off"


def test_rule__per_image_keeps_a_crop_and_its_own_cls_together() -> None:
    image, tile = np.array([0, 0, 0, 0, 0, 0, 1, 1]), np.array([-1, 0, 0, -1, 1, 1, -1, 0])
    tokens = {"position": np.arange(8), "image_index": image, "tile": tile}
    allowed = rule("per_image").allowed(tokens, tokens)
    expected = ["11100000"] * 3 + ["00011100"] * 3 + ["00000011"] * 2
    assert ["".join("01"[int(cell)] for cell in row) for row in allowed] == expected


def test_rule__image_windows_split_a_grid() -> None:
    row, col = np.divmod(np.arange(16), 4)
    grid = {"position": np.arange(16), "image_index": np.zeros(16, int), "tile": np.zeros(16, int)}
    tokens = grid | {"patch_row": row, "patch_col": col}
    allowed = rule("image_windows").allowed(tokens, tokens)
    assert np.flatnonzero(allowed[5]).tolist() == [0, 1, 4, 5]
    assert (allowed.sum(axis=1) == 4).all()


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"mask": "alibi", "scale": 1.0}, "mask 'alibi' with scale 1.0"),
        ({"scale": 1.0}, "mask None"),
        ({"mask": "causal"}, "scale None"),
        ({"mask": "causal", "scale": 1.0, "bias": "t5"}, "has bias, which is not known here"),
        ({"mask": "causal", "scale": 1.0, "sinks": True}, "sinks, whose logits are not in the run"),
        ({"mask": "causal", "scale": 1.0, "sinks": [0.5, None]}, "sinks, whose logits are not in the run"),
        ({"mask": "sliding_window", "scale": 1.0}, "mask 'sliding_window' with window None"),
        ({"mask": "sliding_window", "scale": 1.0, "window": 0}, "with window 0"),
        ({"mask": "causal", "scale": 1.0, "window": 4}, "mask 'causal' with window 4"),
    ],
)
def test_rule__anything_else_is_an_error(recorded: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as raised:
        AttentionRule.parse(recorded, "text/q, layer 3")
    assert len(str(raised.value).splitlines()) == 2
    assert str(raised.value).startswith("text/q, layer 3")


def test_read_rules__keeps_the_sinks_of_the_heads_held() -> None:
    recorded = {"0": {"mask": "causal", "scale": 1.0, "sinks": [0.5, -2, 3]}}
    sinks = read_rules(recorded, np.array([0]), np.array([2, 0]), "text/q")[0].sinks
    assert sinks is not None
    assert sinks.tolist() == [3, 0.5]
    with pytest.raises(FormatError, match="layer 0: 3 sinks, and a head 3"):
        read_rules(recorded, np.array([0]), np.array([3]), "text/q")


def test_read_rules__every_layer_must_have_one() -> None:
    recorded = {"0": {"mask": "causal", "scale": 1.0}, "2": {"mask": "prefix", "scale": 0.5, "softcap": 50.0}}
    rules = read_rules(recorded, np.array([2, 0]), HEADS, "text/q")
    assert rules[2] == AttentionRule("prefix", 0.5, None, 50.0)
    with pytest.raises(FormatError, match="no attention rule for layer 1, only for 0, 2"):
        read_rules(recorded, np.array([1]), HEADS, "text/q")


def test_read_rules__a_vision_encoder_sees_one_image_at_a_time() -> None:
    recorded = {"0": {"mask": "bidirectional", "scale": 1.0}}
    assert read_rules(recorded, np.array([0]), HEADS, "vision/q")[0].mask == "per_image"
    assert read_rules(recorded, np.array([0]), HEADS, "text/q")[0].mask == "bidirectional"
