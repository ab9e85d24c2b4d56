"""Segments of an encoder: which tokens see each other, and calls that are not whole segments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llava, samples

from mechanistic.analysis.mask_rules import AttentionRule
from mechanistic.capture.coordinates import image_layout
from mechanistic.capture.encoder_masks import EncoderMasks, encoder_rule
from mechanistic.capture.mask_rules import MaskRule
from mechanistic.capture.tap import AttentionCall
from mechanistic.store.errors import CaptureError


def table(rows: int, cols: int, *, image: int = 0, tile: int = 0) -> dict[str, Any]:
    """One tile of an image, cell by cell."""
    row, col = (index.ravel() for index in np.indices((rows, cols)))
    count = rows * cols
    return {
        "sample_index": np.zeros(count, np.int32),
        "image_index": np.full(count, image, np.int16),
        "tile": np.full(count, tile, np.int16),
        "patch_row": row.astype(np.int16),
        "patch_col": col.astype(np.int16),
    }


def call(batch: int, tokens: int, mask: torch.Tensor | None = None) -> AttentionCall:
    tensor = torch.zeros(batch, 1, tokens, 2)
    return AttentionCall(
        module=torch.nn.Identity(),
        query=tensor,
        key=tensor,
        value=tensor,
        output=tensor.transpose(1, 2),
        mask=mask,
        scale=1.0,
        softcap=None,
        window=None,
        sinks=None,
        position_bias=None,
        causal=False,
    )


PER_IMAGE, WINDOWS = MaskRule("per_image"), MaskRule("image_windows", 2)


def test_segments__are_crops_and_windows() -> None:
    masks = EncoderMasks([table(2, 4), table(1, 2, tile=1), table(1, 2, image=1)])
    assert masks.segments(PER_IMAGE).tolist() == [0] * 8 + [1] * 2 + [2] * 2


def test_segments__are_what_the_analyses_rebuild() -> None:
    columns = table(4, 2)
    numbers = EncoderMasks([columns]).segments(WINDOWS)
    rule = AttentionRule.parse({"mask": "image_windows", "scale": 1.0, "window": 2}, "here")
    columns["position"] = np.arange(8)
    np.testing.assert_array_equal(numbers[:, None] == numbers, rule.allowed(columns, columns))


def test_segments__tokens_of_a_window_must_come_in_a_row() -> None:
    with pytest.raises(
        CaptureError, match="does not see the tokens of each 'image_windows' segment in a row"
    ):
        EncoderMasks([table(2, 4)]).segments(WINDOWS)


def test_check__takes_segments_as_rows_or_as_calls() -> None:
    tables = [table(2, 2), table(2, 2, image=1)]
    rows, calls = EncoderMasks(tables), EncoderMasks(tables)
    rows.check(PER_IMAGE, call(2, 4), 0)
    calls.check(PER_IMAGE, call(1, 4), 0)
    calls.check(PER_IMAGE, call(1, 4, torch.ones(1, 1, 4, 4, dtype=torch.bool)), 0)
    rows.check(PER_IMAGE, call(2, 4), 1)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (4, 2), (1, 3), (3, 4)])
def test_check__a_call_that_is_no_whole_segment_is_an_error(batch: int, tokens: int) -> None:
    with pytest.raises(CaptureError, match=r"vision\.3: its attention is not 'per_image'.*not one segment"):
        EncoderMasks([table(2, 2), table(2, 2, image=1)]).check(PER_IMAGE, call(batch, tokens), 3)


def test_check__a_segment_that_is_closed_inside_is_an_error() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    with pytest.raises(CaptureError, match="may not attend to each other"):
        EncoderMasks([table(2, 2)]).check(PER_IMAGE, call(1, 4, causal), 0)


def test_encoder_rule__windows_are_counted_in_patches() -> None:
    config = SimpleNamespace(fullatt_block_indexes=[1], window_size=112, patch_size=14)
    assert encoder_rule(config, 0) == MaskRule("image_windows", 8)
    assert encoder_rule(config, 1) == PER_IMAGE
    assert encoder_rule(SimpleNamespace(), 0) == PER_IMAGE


def test_image_layout__one_llava_image_is_one_segment() -> None:
    loaded = llava()
    image = samples(1)[0].images[0]
    encoder = image_layout(loaded.model, loaded.processor, *image.size).encoder  # type: ignore[union-attr]
    assert set(encoder.tile.tolist()) == {0}
