"""Entropy on a scale of 0 to 1."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from run_groups import stacked_attention
from scipy.stats import entropy
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_evenness import attention_evenness
from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.store.errors import DataError


def test_attention_evenness__by_hand() -> None:
    rows = np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0]])
    expected = [1, np.nan, 1, 1.5 * np.log(2) / np.log(3)]
    np.testing.assert_allclose(attention_evenness(rows), expected)


def test_attention_evenness__scipy_entropy_over_allowed_keys() -> None:
    run = synthetic_run(query_tokens="all")
    lazy = attention_evenness(run, layer=1)["attention_evenness"]
    assert isinstance(lazy.data, da.Array)
    found = lazy.compute()
    rows = found.values[0][found["sample_index"].values == 7]
    dense = stacked_attention(run, 7)[1]
    for query in range(1, len(rows)):
        expected = entropy(dense[:, query, : query + 1], axis=-1) / np.log(query + 1)
        np.testing.assert_allclose(rows[query], expected, atol=1e-5)
    assert np.isnan(rows[0]).all()
    assert np.nanmax(found) <= 1


def test_attention_evenness__uniform_rows_of_any_length_are_even() -> None:
    run = synthetic_run(query_tokens="all")
    run["text/q"]["q"] = run["text/q"]["q"] * 0
    found = attention_evenness(run)["attention_evenness"].values
    np.testing.assert_allclose(found[~np.isnan(found)], 1, atol=1e-6)


def test_attention_evenness__lazy_pattern_is_eager() -> None:
    pattern = attention_pattern(synthetic_run(), sample=3)
    lazy = attention_evenness(pattern)["attention_evenness"]
    assert isinstance(lazy.data, da.Array)
    np.testing.assert_array_equal(lazy, attention_evenness(pattern["attention_pattern"].values))


def test_attention_evenness__refuses_logits() -> None:
    with pytest.raises(DataError, match=r"sum to 1.*\n  Pass weights after the softmax"):
        attention_evenness(np.ones((2, 5)))
