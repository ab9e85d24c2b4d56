"""Masks of cross-attention and of padded images: by hand, as analyses rebuild them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mechanistic.analysis.mask_rules import AttentionRule
from mechanistic.capture.batch_plan import batches
from mechanistic.capture.dataset import Sample
from mechanistic.capture.encoder_masks import PADDED, EncoderMasks
from mechanistic.capture.mask_rules import MaskRule, check_cross_rule, cross_allowed, find_cross_rule
from mechanistic.capture.residual import Halves
from mechanistic.capture.tap import AttentionCall
from mechanistic.store.errors import CaptureError

# Two images, seen from the tokens 1 and 2 on, the first of two keys, the second of one and an empty place.
KEYS: dict[str, Any] = {"position": np.arange(4), "first_query": np.array([1, 1, 2, -1])}
QUERIES: dict[str, Any] = {"position": np.arange(4)}
SEEN = ["1111", "1100", "1110", "1110"]


def call(mask: torch.Tensor | None, queries: int = 4, keys: int = 4) -> AttentionCall:
    query, key = torch.zeros(1, 2, queries, 4), torch.zeros(1, 2, keys, 4)
    return AttentionCall(
        module=torch.nn.Identity(),
        query=query,
        key=key,
        value=key,
        output=query.transpose(1, 2),
        mask=mask,
        scale=1.0,
        softcap=None,
        window=None,
        sinks=None,
        position_bias=None,
        causal=False,
    )


def as_mask(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[cell == "1" for cell in row] for row in rows])[None, None]


def test_cross_from__by_hand_and_as_the_analyses_rebuild_it() -> None:
    allowed = cross_allowed(MaskRule("cross_from"), QUERIES["position"], KEYS["first_query"])
    assert ["".join("01"[int(cell)] for cell in row) for row in allowed] == SEEN
    rule = AttentionRule.parse({"mask": "cross_from", "scale": 1.0}, "text/xq, layer 1")
    np.testing.assert_array_equal(allowed, rule.allowed(QUERIES, KEYS))


def test_find_cross_rule__is_read_off_the_mask_and_held_against_the_next() -> None:
    assert find_cross_rule(call(None), [QUERIES], [KEYS], "here") == MaskRule("cross")
    seen = call(as_mask(SEEN))
    rule = find_cross_rule(seen, [QUERIES], [KEYS], "here")
    assert rule == MaskRule("cross_from")
    check_cross_rule(rule, seen, [QUERIES], [KEYS], "here")
    with pytest.raises(CaptureError, match=r"text/x\.1: the mask of its cross-attention is not 'cross_from'"):
        check_cross_rule(rule, call(None), [QUERIES], [KEYS], "text/x.1")
    with pytest.raises(CaptureError, match="no mask rule explains the mask of its cross-attention"):
        find_cross_rule(call(as_mask(["1000", *SEEN[1:]])), [QUERIES], [KEYS], "here")
    # Keys that no label stands for are not quietly dropped.
    with pytest.raises(CaptureError, match="no mask rule"):
        find_cross_rule(call(None, keys=5), [QUERIES], [KEYS], "here")


def image(tiles: list[int]) -> dict[str, Any]:
    count = len(tiles)
    places = {name: np.full(count, -1, np.int16) for name in ("patch_row", "patch_col")}
    owner = {"sample_index": np.zeros(count, np.int32), "image_index": np.zeros(count, np.int16)}
    return {**owner, **places, "tile": np.array(tiles, np.int16), "position": np.arange(count)}


def test_padded_image__padding_is_closed_to_padding_alone() -> None:
    columns, rule = image([0, 0, -1, -1]), MaskRule(PADDED)
    expected = as_mask(["1111", "1111", "1100", "1100"])
    EncoderMasks([columns]).check(rule, call(expected), 0)
    analysed = AttentionRule.parse({"mask": PADDED, "scale": 1.0}, "vision/q, layer 0")
    np.testing.assert_array_equal(analysed.allowed(columns, columns), expected[0, 0].numpy())
    for wrong in (None, as_mask(["1111", "1110", "1100", "1100"])):
        with pytest.raises(
            CaptureError, match=r"vision\.0: its attention is not 'padded_image'.*only padding"
        ):
            EncoderMasks([columns]).check(rule, call(wrong), 0)


def test_batches__of_equally_many_images() -> None:
    picture = Image.new("RGB", (4, 4))
    asked = {number: Sample(str(number), (picture,) * (1 + number % 2), "?") for number in range(5)}
    assert batches(asked, 4, equal_images=True) == [[0, 2, 4], [1, 3]]
    assert [len(batch) for batch in batches(asked, 4)] == [4, 1]


def test_halves__of_layers_of_two_kinds_say_which() -> None:
    plain, gated = Halves("self_attn", "mlp", True), Halves("cross_attn", "mlp", True, "norm")
    both = Halves.of_layers([plain, gated, plain])
    assert both.at(1) == gated
    assert Halves.of_layers([plain, plain]) == plain
    assert both.define([0, 2])["attn_out"] == "output of self_attn"
    told = both.definition["attn_out"]
    assert told.startswith("layer 0, 2: output of self_attn; layer 1: resid_mid - resid_pre")
