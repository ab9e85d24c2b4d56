"""The pattern of one sample."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from synthetic_run import dense_attention, synthetic_run

from mechanistic.analysis import attention_pattern
from mechanistic.store import site
from mechanistic.store.errors import DataError, SpecificationError

RUN = synthetic_run()


def test_attention_pattern__is_the_plain_definition_lazily() -> None:
    pattern = attention_pattern(RUN, sample=5)
    weights = pattern["attention_pattern"]
    assert isinstance(weights.data, da.Array)
    assert weights.dims == ("layer", "head", "query", "key")
    assert weights.dtype == np.float32
    for layer in range(4):
        np.testing.assert_allclose(weights.sel(layer=layer), dense_attention(RUN, 5, layer), atol=2e-6)


def test_attention_pattern__is_labelled() -> None:
    pattern = attention_pattern(RUN, sample=5)
    assert pattern["key_position"].values.tolist() == list(range(pattern.sizes["key"]))
    assert pattern["key_token_text"].values[:3].tolist() == ["<s>", "<image>", "<image>"]
    assert pattern["query_token_text"].values[-2:].tolist() == ["assistant", "left"]
    assert pattern["key_box_x1"].values[1] == 32
    assert pattern.attrs["sample"] == 5


def test_attention_pattern__by_hand_at_the_first_tokens() -> None:
    first = attention_pattern(RUN, sample=0, layer=2, head=1, query=0)["attention_pattern"]
    assert first.dims == ("key",)
    assert first.values[0] == 1
    assert (first.values[1:] == 0).all()


def test_attention_pattern__a_slice_is_that_part_of_the_whole() -> None:
    whole = attention_pattern(RUN, sample=7)["attention_pattern"].compute()
    part = attention_pattern(RUN, sample=7, layer=3, head=[2, 0], query="last")["attention_pattern"]
    last = np.flatnonzero(whole["query_is_last_prompt"].values)
    xr.testing.assert_allclose(part.compute(), whole.sel(layer=3, head=[2, 0]).isel(query=last))
    single = attention_pattern(RUN, sample=7, layer=[3], head=2, query="last")["attention_pattern"]
    assert single.dims == ("layer", "query", "key")


def test_attention_pattern__finds_a_planted_hub() -> None:
    pattern = attention_pattern(synthetic_run(hub=4), sample=1, query="last")["attention_pattern"]
    assert (pattern.argmax("key") == 4).all()


def test_attention_pattern__errors() -> None:
    with pytest.raises(SpecificationError, match="no head 9; there are 0, 1, 2, 3"):
        attention_pattern(RUN, sample=0, head=9)
    with pytest.raises(SpecificationError, match="no layer 7"):
        attention_pattern(RUN, sample=0, layer=7)
    with pytest.raises(SpecificationError, match="not one row of samples"):
        attention_pattern(RUN, sample=[0, 1])  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="query='@-1'"):
        attention_pattern(RUN, sample=0, query=-1)
    with pytest.raises(DataError, match="sample 12 has no such tokens"):
        attention_pattern(RUN, sample=12)
    with pytest.raises(DataError, match="sample 0 has no such tokens"):
        attention_pattern(RUN, sample=0, query=2)


def test_attention_pattern__a_vision_encoder_sees_one_image_at_a_time() -> None:
    groups = {}
    for name in ("q", "k"):
        rows = site(synthetic_run(sets=1, mask="bidirectional", query_tokens="all"), f"text/{name}")
        halves = (rows["position"].values > 4).astype(np.int16)
        rows = rows.rename(token="patch").drop_vars(["token_text", "is_last_prompt"])
        rows = rows.assign_coords(image_index=("patch", halves), tile=("patch", 0 * halves))
        groups[f"/vision/{name}"] = rows
    pattern = attention_pattern(xr.DataTree.from_dict(groups), sample=1, layer=0, stack="vision")
    weights = pattern["attention_pattern"].values
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    same = pattern["query_image_index"].values[:, None] == pattern["key_image_index"].values[None, :]
    assert ((weights > 0) == same).all()
