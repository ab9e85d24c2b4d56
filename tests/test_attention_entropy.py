"""Entropy of attention rows."""

from __future__ import annotations

import math

import dask.array as da
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from run_groups import stacked_attention
from synthetic_run import dense_attention, synthetic_run

from mechanistic.analysis import attention_entropy, attention_pattern
from mechanistic.store.errors import DataError, DimensionError

RUN = synthetic_run()


def test_attention_entropy__by_hand() -> None:
    rows = [[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]]
    np.testing.assert_allclose(attention_entropy(rows), [0, math.log(4), math.log(2)], atol=1e-7)


def test_attention_entropy__of_a_run_equals_scipy() -> None:
    entropy = attention_entropy(RUN).compute()["attention_entropy"]
    assert entropy.dims == ("layer", "token", "head")
    for sample in range(12):
        rows = entropy["sample_index"].values == sample
        for layer in (0, 2):
            expected = scipy.stats.entropy(dense_attention(RUN, sample, layer), axis=-1)
            np.testing.assert_allclose(entropy.sel(layer=layer).values[rows], expected.T, atol=1e-5)


def test_attention_entropy__is_lazy_and_labelled() -> None:
    entropy = attention_entropy(RUN)
    assert isinstance(entropy["attention_entropy"].data, da.Array)
    assert entropy["attention_entropy"].dtype == np.float32
    assert entropy["attention_entropy"].attrs["units"] == "nat"
    assert {"sample_index", "kind", "token_text", "patch_row"} <= set(entropy.coords)


def test_attention_entropy__of_patterns_equals_that_of_the_run() -> None:
    pattern = attention_pattern(RUN, sample=3)
    entropy = attention_entropy(pattern)
    assert isinstance(entropy["attention_entropy"].data, da.Array)
    expected = attention_entropy(RUN, sample=3)["attention_entropy"].values.transpose(0, 2, 1)
    np.testing.assert_allclose(entropy["attention_entropy"].values, expected, atol=1e-5)
    eager = attention_entropy(pattern.compute())
    xr.testing.assert_allclose(eager, entropy.compute())


def test_attention_entropy__normalised_by_hand() -> None:
    rows = np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0]])
    expected = [1, np.nan, 1, 1.5 * np.log(2) / np.log(3)]
    np.testing.assert_allclose(attention_entropy(rows, normalize=True), expected)
    with pytest.raises(DataError, match=r"sum to 1.*\n  Pass weights after the softmax"):
        attention_entropy(np.ones((2, 5)), normalize=True)


def test_attention_entropy__normalised_by_the_keys_that_are_allowed() -> None:
    run = synthetic_run(query_tokens="all")
    lazy = attention_entropy(run, layer=1, normalize=True)["normalized_entropy"]
    assert isinstance(lazy.data, da.Array)
    found = lazy.compute()
    rows = found.values[0][found["sample_index"].values == 7]
    dense = stacked_attention(run, 7)[1]
    for query in range(1, len(rows)):
        expected = scipy.stats.entropy(dense[:, query, : query + 1], axis=-1) / np.log(query + 1)
        np.testing.assert_allclose(rows[query], expected, atol=1e-5)
    assert np.isnan(rows[0]).all()
    assert np.nanmax(found) <= 1


def test_attention_entropy__normalised_uniform_rows_of_any_length_have_1() -> None:
    run = synthetic_run(query_tokens="all")
    run["text/q"]["q"] = run["text/q"]["q"] * 0
    found = attention_entropy(run, normalize=True)["normalized_entropy"].values
    np.testing.assert_allclose(found[~np.isnan(found)], 1, atol=1e-6)


def test_attention_entropy__normalised_lazy_pattern_is_eager() -> None:
    pattern = attention_pattern(RUN, sample=3)
    lazy = attention_entropy(pattern, normalize=True)["normalized_entropy"]
    assert isinstance(lazy.data, da.Array)
    eager = attention_entropy(pattern["attention_pattern"].values, normalize=True)
    np.testing.assert_array_equal(lazy, eager)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_attention_entropy__takes_tensors(dtype: str) -> None:
    import torch

    weights = torch.softmax(torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)), -1)
    entropy = attention_entropy(weights.to(getattr(torch, dtype), copy=True).requires_grad_())
    assert isinstance(entropy, np.ndarray)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(weights.numpy(), axis=-1), atol=2e-2)


def test_attention_entropy__causal_zeros_count_nothing() -> None:
    weights = np.tril(np.ones((6, 6)))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_entropy(weights), np.log(np.arange(1, 7)), atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, np.nan]], "1 of 1 attention rows hold NaN"),
        ([[3.0, -1.0]], "must be weights that sum to 1"),
        ([[1.5, -0.5]], r"off by up to 0 \(smallest value -0.5\)"),
        ([[0.2, 0.2]], "off by up to 0.6"),
    ],
)
def test_attention_entropy__refuses_what_are_no_weights(weights: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        attention_entropy(weights)


def test_attention_entropy__refuses_other_shapes() -> None:
    with pytest.raises(DimensionError, match=r"the shape \(\)"):
        attention_entropy(1.0)
    with pytest.raises(DimensionError, match=r"the shape \(2, 0\)"):
        attention_entropy(np.zeros((2, 0)))
    with pytest.raises(DimensionError, match="no 'attention_pattern'; they have other"):
        attention_entropy(xr.Dataset({"other": ("key", [1.0])}))
    pattern = attention_pattern(RUN, sample=3)
    with pytest.raises(DimensionError, match="'key' is cut into"):
        attention_entropy(pattern.chunk(key=2))
    with pytest.raises(DimensionError, match="has a dimension 'key'"):
        attention_entropy(pattern.rename(key="column"))


def test_attention_entropy__errors_of_lazy_patterns_come_when_computed() -> None:
    lazy = attention_entropy(attention_pattern(RUN, sample=3) * 2)
    with pytest.raises(DataError, match="off by up to 1"):
        lazy.compute()
