"""Attention sinks: logits that take part in the softmax of a head and belong to no key."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from run_groups import without_groups
from synthetic_run import dense_attention, synthetic_run
from tiny_models import Listed
from zoo import ZOO, samples

from mechanistic.analysis import (
    attention_concentration,
    attention_distance,
    attention_entropy,
    attention_mass,
    attention_pattern,
    attention_sparsity,
    rollout_row,
    two_hop,
)
from mechanistic.capture.job import capture_run
from mechanistic.store import open_run
from mechanistic.store.errors import DataError

SINKS = [0.7, -1.5, 3.0, 0.0]


def with_sinks(run: xr.DataTree, sinks: list[float]) -> xr.DataTree:
    for name in ("q", "k"):
        for rule in run[f"text/{name}"].attrs["attention"].values():
            rule["sinks"] = sinks
    return run


@pytest.fixture(scope="module")
def made() -> xr.DataTree:
    return with_sinks(synthetic_run(query_tokens="all"), SINKS)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    family = ZOO["gpt_oss"]
    path: Path = tmp_path_factory.mktemp("gpt_oss") / "run"
    sites = ["text.*.q", "text.*.k", "text.*.attn_stats", "text.*.pattern"]
    capture_run(family.build(), Listed(samples(family)), path, sites=sites, max_new_tokens=0, quiet=True)
    return open_run(path)


def test_sinks__one_key_more_by_hand(made: xr.DataTree) -> None:
    plain = dense_attention(made, 7, 1)
    query, key = (made[f"text/{name}"].to_dataset(inherit=False) for name in ("q", "k"))
    here = np.flatnonzero(query["sample_index"].values == 7)
    q = query["q"].sel(layer=1).values[here].astype(float)
    k = np.repeat(key["k"].sel(layer=1).values[here].astype(float), 2, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    exponentials = np.exp(scores) * np.tril(np.ones((len(here), len(here))))
    sums = exponentials.sum(-1, keepdims=True)
    np.testing.assert_allclose(exponentials / sums, plain, atol=1e-5)
    expected = exponentials / (sums + np.exp(SINKS)[:, None, None])
    pattern = attention_pattern(made, sample=7, layer=1)
    np.testing.assert_allclose(pattern["attention_pattern"].values, expected, atol=1e-5)
    heads = attention_pattern(made, sample=7, layer=1, head=[2, 0])["attention_pattern"].values
    np.testing.assert_allclose(heads, expected[[2, 0]], atol=1e-5)


def test_sinks__attention_is_that_of_the_captured_rows(gpt_oss: xr.DataTree) -> None:
    without = without_groups(gpt_oss, "text/q")
    for number in range(4):
        rebuilt = attention_pattern(gpt_oss, sample=number)["attention_pattern"]
        stored = attention_pattern(without, sample=number)["attention_pattern"]
        np.testing.assert_allclose(rebuilt.values, stored.values, atol=1e-6)
        assert rebuilt.attrs["sinks"]
        assert stored.attrs["sinks"]
        assert float(rebuilt.sum("key").max()) < 1


def test_sinks__statistics_are_those_computed_during_capture(gpt_oss: xr.DataTree) -> None:
    stored = gpt_oss["text/attn_stats"].to_dataset()
    found = [attention_entropy(gpt_oss), attention_concentration(gpt_oss), attention_mass(gpt_oss)]
    for name, values in ((name, each[name]) for each in found for name in each.data_vars):
        np.testing.assert_allclose(values.values, stored[name].values, atol=1e-5)


def test_sinks__a_pattern_gives_what_the_run_gives(made: xr.DataTree) -> None:
    pattern = attention_pattern(made, sample=7)
    for measure, name in (
        (attention_entropy, "attention_entropy"),
        (attention_concentration, "attention_concentration"),
    ):
        of_run = measure(made, sample=7)[name].transpose("layer", "head", "token").values
        np.testing.assert_allclose(measure(pattern)[name].values, of_run, atol=1e-5)
    with pytest.raises(DataError, match="must be weights that sum to 1"):
        attention_entropy(pattern["attention_pattern"].values)


def test_sinks__shares_among_keys_do_not_depend_on_them(made: xr.DataTree) -> None:
    plain = synthetic_run(query_tokens="all")
    for measure in (attention_distance, attention_sparsity):
        xr.testing.assert_allclose(measure(made).compute(), measure(plain).compute(), atol=1e-5)
    even, odd = (attention_entropy(run, normalize=True).compute() for run in (plain, made))
    xr.testing.assert_allclose(even, odd, atol=1e-5)
    shares = [two_hop(run)["share"].values for run in (plain, made)]
    assert np.nanmax(np.abs(shares[0] - shares[1])) > 1e-3
    rolled = rollout_row(made, tokens="last").compute()["attention_rollout"]
    np.testing.assert_allclose(rolled.groupby("sample_index").sum(), 1, atol=1e-5)


def test_sinks__uniform_rows() -> None:
    run = with_sinks(synthetic_run(query_tokens="all"), [math.log(2.0)] * 4)
    run["text/q"]["q"] = run["text/q"]["q"] * 0
    keys = run["text/q"]["position"].values[:, None] + 1.0
    weight = 1 / (keys + 2)
    entropy = attention_entropy(run, layer=1)["attention_entropy"].values[0]
    np.testing.assert_allclose(
        entropy, np.broadcast_to(-keys * weight * np.log(weight), entropy.shape), atol=1e-5
    )
    mass = attention_mass(run, layer=1)["mass_first"].values[0]
    np.testing.assert_allclose(mass, np.broadcast_to(weight, mass.shape), atol=1e-6)


def test_sinks__one_that_takes_all_leaves_nothing() -> None:
    run = with_sinks(synthetic_run(query_tokens="all"), [500.0] * 4)
    assert float(attention_mass(run)["mass_first"].max()) == 0
    assert float(attention_entropy(run)["attention_entropy"].max()) == 0
    assert attention_entropy(run, normalize=True)["normalized_entropy"].isnull().all()
    assert attention_distance(run)["attention_distance"].isnull().all()
