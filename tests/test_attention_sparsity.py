"""Sparsity of attention rows: three measures by hand, by their other definitions, and from a run."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import stacked_attention
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.analysis.attention_sparsity import Measure, attention_sparsity
from mechanistic.store.errors import DataError, MissingSiteError, SpecificationError

MEASURES: tuple[Measure, ...] = ("gini", "hoyer", "key_share")


def reference(row: np.ndarray, measure: str, mass: float = 0.9) -> float:
    """Gini as half the relative mean absolute difference, Hoyer from norms, and a plain count."""
    if measure == "gini":
        return float(np.abs(row[:, None] - row[None, :]).mean() / (2 * row.mean()))
    if measure == "hoyer":
        root = np.sqrt(row.size)
        return float((root - np.abs(row).sum() / np.linalg.norm(row)) / (root - 1))
    taken, count = 0.0, 0
    for weight in sorted(row, reverse=True):
        taken, count = taken + weight, count + 1
        if taken >= mass - 1e-6:
            break
    return count / row.size


@pytest.mark.parametrize(
    ("measure", "uniform", "one_key", "halves"),
    [("gini", 0, 0.75, 0.5), ("hoyer", 0, 1, 2 - np.sqrt(2)), ("key_share", 1, 0.25, 0.5)],
)
def test_attention_sparsity__by_hand(measure: Measure, uniform: float, one_key: float, halves: float) -> None:
    rows = np.array([[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0.5, 0, 0.5, 0]])
    np.testing.assert_allclose(
        attention_sparsity(rows, measure=measure), [uniform, one_key, halves], atol=1e-12
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_attention_sparsity__plain_definition(measure: Measure) -> None:
    rows = np.random.default_rng(0).dirichlet(np.full(17, 0.3), size=40)
    expected = [reference(row, measure) for row in rows]
    np.testing.assert_allclose(attention_sparsity(rows, measure=measure), expected, atol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_attention_sparsity__run_counts_allowed_keys_only(measure: Measure) -> None:
    run = synthetic_run(query_tokens="all")
    lazy = attention_sparsity(run, measure=measure, layer=2)[f"attention_{measure}"]
    assert isinstance(lazy.data, da.Array)
    found = lazy.compute()
    for sample in (0, 5):
        rows = found.values[0][found["sample_index"].values == sample]
        dense = stacked_attention(run, sample)[2]
        for query in (1, 4, len(rows) - 1):
            expected = [reference(dense[head, query, : query + 1], measure) for head in range(4)]
            np.testing.assert_allclose(rows[query], expected, atol=1e-5)
    first = found.values[0][found["position"].values == 0]
    assert np.isnan(first).all() if measure == "hoyer" else (first == (0 if measure == "gini" else 1)).all()


def test_attention_sparsity__lazy_pattern_is_eager() -> None:
    pattern = attention_pattern(synthetic_run(), sample=3, query="last")
    lazy = attention_sparsity(pattern)["attention_gini"]
    assert isinstance(lazy.data, da.Array)
    np.testing.assert_array_equal(lazy, attention_sparsity(pattern["attention_pattern"].values))


def test_attention_sparsity__hub_is_sparse() -> None:
    run, hub = synthetic_run(), synthetic_run(hub=2)
    plain, planted = (attention_sparsity(each, tokens="last")["attention_gini"].mean() for each in (run, hub))
    assert planted > plain + 0.2


def test_attention_sparsity__errors() -> None:
    row = np.full(4, 0.25)
    with pytest.raises(SpecificationError, match=r"no measure of sparsity 'l1'\.\n  The measures are gini"):
        attention_sparsity(row, measure="l1")  # type: ignore[call-overload]
    with pytest.raises(SpecificationError, match="mass is 1"):
        attention_sparsity(row, mass=1.0)
    with pytest.raises(DataError, match="sum to 1"):
        attention_sparsity(2 * row)
    with pytest.raises(MissingSiteError, match="text/q"):
        attention_sparsity(xr.DataTree())
