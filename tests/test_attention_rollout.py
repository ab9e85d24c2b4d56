"""Attention rollout, of every token and of one row."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from run_groups import stacked_attention, tokens_of, without_groups
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_rollout import attention_rollout, rollout_row
from mechanistic.analysis.attention_transitions import Fusion
from mechanistic.store.errors import DataError, DimensionError, MissingSiteError, SpecificationError

OPTIONS = [
    {},
    {"head_fusion": "max"},
    {"head_fusion": "min", "residual": 0.2},
    {"discard": 0.4},
    {"head_fusion": "max", "discard": 0.7, "residual": 0.0},
]


def reference(
    weights: np.ndarray, head_fusion: str = "mean", residual: float = 0.5, discard: float = 0.0
) -> np.ndarray:
    """The definition, with dense matrices and plain loops; every level of the product."""
    rolled = np.eye(weights.shape[-1])
    levels = []
    for layer in weights:
        fused = getattr(layer, head_fusion)(axis=0)
        for row in fused:
            order = sorted(np.flatnonzero(row), key=lambda key: row[key])
            row[order[: int(discard * len(order))]] = 0
        mixed = residual * np.eye(len(fused)) + (1 - residual) * fused
        rolled = mixed / mixed.sum(-1, keepdims=True) @ rolled
        levels.append(rolled)
    return np.stack(levels)


def test_attention_rollout__by_hand() -> None:
    # Two layers, one head, two tokens; the second looks at the first only.
    weights = np.array([[[[1, 0], [1, 0]]], [[[1, 0], [0.5, 0.5]]]], float)
    rolled = attention_rollout(weights)
    np.testing.assert_allclose(rolled[0], [[1, 0], [0.5, 0.5]])
    # Second layer: 0.5 I + 0.5 A = [[1, 0], [0.25, 0.75]].
    np.testing.assert_allclose(rolled[1], [[1, 0], [0.25 + 0.75 * 0.5, 0.75 * 0.5]])


def test_attention_rollout__without_attention_only_the_residual_is_left() -> None:
    weights = np.full((3, 2, 4, 4), 0.25)
    np.testing.assert_allclose(attention_rollout(weights, residual=0), np.full((3, 4, 4), 0.25))
    near = attention_rollout(weights, residual=0.999)
    np.testing.assert_allclose(near[-1], np.eye(4), atol=3e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_rollout__dense_product(options: dict[str, Any]) -> None:
    run = synthetic_run(query_tokens="all")
    expected = reference(stacked_attention(run, 5), **options)
    lazy = attention_rollout(run, sample=5, **options)["attention_rollout"]
    assert isinstance(lazy.data, da.Array)
    assert lazy.dims == ("layer", "query", "key")
    np.testing.assert_allclose(lazy, expected, atol=2e-6)
    np.testing.assert_allclose(lazy.sum("key"), 1, atol=1e-5)
    np.testing.assert_allclose(attention_rollout(stacked_attention(run, 5), **options), expected, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_rollout_row__is_the_row_of_the_dense_product(options: dict[str, Any]) -> None:
    run = synthetic_run(query_tokens="all")
    lazy = rollout_row(run, **options)["attention_rollout"]
    assert isinstance(lazy.data, da.Array)
    assert lazy.dims == ("layer", "token")
    found = lazy.compute()
    for sample in (0, 5, 11):
        mine = found.isel(token=np.flatnonzero(found["sample_index"].values == sample))
        last = int(np.flatnonzero(tokens_of(run, sample)["is_last_prompt"])[0])
        weights = stacked_attention(run, sample)
        np.testing.assert_allclose(mine[0], reference(weights, **options)[-1, last], atol=2e-6)
        # At the input of layer 2: what the layers from 2 upwards do.
        np.testing.assert_allclose(mine[2], reference(weights[2:], **options)[-1, last], atol=2e-6)


def test_rollout_row__keeps_no_square() -> None:
    lazy = rollout_row(synthetic_run(query_tokens="all"))["attention_rollout"]
    layers = lazy.data.__dask_graph__().layers
    steps = [layer for name, layer in layers.items() if name.startswith("step-")]
    assert [len(step.output_indices) for step in steps] == [1, 1, 1, 1]


def test_rollout_row__several_tokens_average_their_rows() -> None:
    run = synthetic_run(query_tokens="all")
    both = rollout_row(run, tokens="last+@0")["attention_rollout"]
    single = [rollout_row(run, tokens=name)["attention_rollout"] for name in ("last", "@0")]
    np.testing.assert_allclose(both, (single[0] + single[1]) / 2, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(1, 30), max_bytes=st.sampled_from([12_000, 30_000, 1 << 27]))
def test_rollout_row__chunks_do_not_matter(chunk: int, max_bytes: int) -> None:
    whole = rollout_row(synthetic_run(query_tokens="all", chunk=200, layers=(0, 1)))
    cut = rollout_row(synthetic_run(query_tokens="all", chunk=chunk, layers=(0, 1)), max_bytes=max_bytes)
    np.testing.assert_allclose(cut["attention_rollout"], whole["attention_rollout"], atol=1e-7)


@pytest.mark.parametrize("mask", ["bidirectional", "prefix", "sliding_window"])
def test_rollout_row__other_masks(mask: str) -> None:
    run = synthetic_run(query_tokens="all", mask=mask, window=3 if mask == "sliding_window" else None)
    row = rollout_row(run, sample=[4])["attention_rollout"]
    whole = attention_rollout(run, sample=4)["attention_rollout"].isel(layer=-1)
    last = int(np.flatnonzero(whole["query_is_last_prompt"])[0])
    np.testing.assert_allclose(row[0], whole.isel(query=last), atol=1e-6)


def test_rollout_row__finds_the_planted_hub() -> None:
    found = rollout_row(synthetic_run(query_tokens="all", hub=3), residual=0)["attention_rollout"][
        0
    ].compute()
    owner, position = found["sample_index"].values, found["position"].values
    for sample in range(12):
        assert position[owner == sample][found.values[owner == sample].argmax()] == 3


def test_attention_rollout__vision_stack() -> None:
    run = synthetic_run(query_tokens="all")
    patches = {
        f"vision/{name}": run[f"text/{name}"]
        .to_dataset()
        .rename(token="patch")
        .drop_vars(
            [
                "token_id",
                "token_text",
                "is_subject",
                "is_object",
                "is_relation",
                "is_option",
                "is_last_prompt",
            ]
        )
        for name in ("q", "k")
    }
    vision = xr.DataTree.from_dict(patches)
    found = attention_rollout(vision, sample=0, stack="vision")["attention_rollout"]
    np.testing.assert_allclose(found, attention_rollout(run, sample=0)["attention_rollout"])
    assert rollout_row(vision, tokens="@0", stack="vision")["attention_rollout"].dims == ("layer", "patch")


def test_attention_rollout__errors() -> None:
    run = synthetic_run(query_tokens="all")
    with pytest.raises(
        SpecificationError, match=r"cannot be fused by 'median'\.\n  Fuse them by mean, max, min"
    ):
        rollout_row(run, head_fusion="median")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="discard ratio 1"):
        Fusion(discard=1)
    with pytest.raises(DataError, match=r"q holds the tokens 'text' only.*\n  Capture every query"):
        rollout_row(synthetic_run())
    with pytest.raises(DataError, match="layers 0, 2 do not follow"):
        rollout_row(run, layer=[0, 2])
    with pytest.raises(DataError, match="sample 0 has no token that is object"):
        rollout_row(run, tokens="object")
    with pytest.raises(DimensionError, match=r"shape \(2, 3, 4\)"):
        attention_rollout(np.full((2, 3, 4), 0.25))
    with pytest.raises(MissingSiteError, match="text/k"):
        attention_rollout(without_groups(run, "text/k"), sample=0)
