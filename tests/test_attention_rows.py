"""Attention rebuilt from q and k: the plain definition, every rule, and what is refused."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from synthetic_run import dense_attention, synthetic_run, with_groups

from mechanistic.analysis.attention_concentration import concentration_statistic
from mechanistic.analysis.attention_entropy import attention_entropy, entropy_statistic
from mechanistic.analysis.attention_mass import attention_mass, mass_statistic
from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.analysis.attention_rows import AttentionRows, RowStatistic, attention_statistics
from mechanistic.store import site
from mechanistic.store.errors import DataError, FormatError, MissingSiteError, SpecificationError

RUN = synthetic_run()


def _all_weights(rows: AttentionRows) -> np.ndarray[Any, Any]:
    padded = np.zeros((*rows.weights.shape[:2], 16), np.float32)
    padded[..., : rows.weights.shape[-1]] = rows.weights
    return padded


WEIGHTS = RowStatistic({f"weight_{key}": {} for key in range(16)}, _all_weights)


def test_walk__weights_are_the_plain_definition() -> None:
    weights = attention_statistics(RUN, [WEIGHTS]).to_array("key").compute()
    for sample in range(12):
        rows = np.flatnonzero(weights["sample_index"].values == sample)
        for layer in (0, 3):
            expected = dense_attention(RUN, sample, layer)
            actual = weights.sel(layer=layer).isel(token=rows).transpose("head", "token", "key").values
            np.testing.assert_allclose(actual[..., : expected.shape[-1]], expected, atol=2e-6)
            assert (actual[..., expected.shape[-1] :] == 0).all()


def test_walk__equals_torch_softmax() -> None:
    import torch

    query, key = site(RUN, "text/q"), site(RUN, "text/k")
    rows, keys = query["sample_index"].values == 4, key["sample_index"].values == 4
    q = torch.tensor(query["q"].sel(layer=1).values[rows]).transpose(0, 1)
    k = torch.tensor(key["k"].sel(layer=1).values[keys]).transpose(0, 1).repeat_interleave(2, 0)
    banned = torch.tensor(query["position"].values[rows])[:, None] < torch.arange(int(keys.sum()))[None]
    weights = torch.softmax((q @ k.mT * 8**-0.5).masked_fill(banned, -torch.inf), -1)
    actual = attention_pattern(RUN, sample=4, layer=1)["attention_pattern"].values
    np.testing.assert_allclose(actual, weights.numpy(), atol=1e-6)


def test_walk__more_rows_than_one_piece() -> None:
    run = synthetic_run(sets=1, grid=12, heads=2, kv_heads=1, query_tokens="all", layers=(0,))
    assert run["text/q"].sizes["token"] > 4 * 128
    pattern = attention_pattern(run, sample=2, layer=0)["attention_pattern"].values
    np.testing.assert_allclose(pattern, dense_attention(run, 2, 0), atol=2e-6)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        ("bidirectional", None),
        ("prefix", None),
        ("causal_image_blocks", None),
        ("sliding_window", 3),
        ("sliding_window_image_blocks", 3),
    ],
)
def test_walk__masks_what_the_rule_says(mask: str, window: int | None) -> None:
    run = synthetic_run(sets=1, mask=mask, window=window, query_tokens="all")
    pattern = attention_pattern(run, sample=1, layer=2)
    weights = pattern["attention_pattern"].values
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    query, key = pattern["query_position"].values[:, None], pattern["key_position"].values[None, :]
    image = pattern["key_kind"].values == 1
    causal, near = key <= query, key > query - (window or 99)
    block = image[:, None] & image[None, :]
    allowed = {
        "bidirectional": np.ones_like(causal),
        "prefix": causal | (pattern["key_kind"].values != 3)[None, :],
        "causal_image_blocks": causal | block,
        "sliding_window": causal & near,
        "sliding_window_image_blocks": (causal | block) & near,
    }[mask]
    assert ((weights > 0) == allowed).all()


def test_walk__softcap_by_hand() -> None:
    run = synthetic_run(sets=1, layers=(0,), softcap=2.0, query_tokens="all")
    q = site(run, "text/q")["q"].values[0, 1].astype(float)
    k = np.repeat(site(run, "text/k")["k"].values[0, :2].astype(float), 2, axis=1)
    logits = 2 * np.tanh(np.einsum("hd,khd->hk", q, k) * 8**-0.5 / 2)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    actual = attention_pattern(run, sample=0, layer=0, query=1)["attention_pattern"].values[:, :2]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_walk__half_precision_is_computed_in_float32() -> None:
    half = synthetic_run(dtype="float16")
    assert site(half, "text/q")["q"].dtype == np.float16
    pattern = attention_pattern(half, sample=0, layer=0)["attention_pattern"]
    assert pattern.dtype == np.float32
    np.testing.assert_allclose(pattern.values, dense_attention(half, 0, 0), atol=2e-6)


def test_walk__huge_logits_stay_finite() -> None:
    query = site(RUN, "text/q")
    loud = with_groups(RUN, text_q=query.assign(q=query["q"] * np.float32(1e4)))
    entropy = attention_entropy(loud)["attention_entropy"].values
    assert np.isfinite(entropy).all()
    assert (entropy >= 0).all()


@pytest.mark.parametrize("shift", [-200.0, -40.0, -9.0, 9.0, 40.0, 200.0])
def test_walk__logits_that_share_a_shift_have_the_same_softmax(shift: float) -> None:
    query, key = site(RUN, "text/q"), site(RUN, "text/k")
    one, all_alike = xr.ones_like(query["q"][..., :1]), xr.full_like(key["k"][..., :1], shift * 8**0.5)
    shifted = with_groups(
        RUN,
        text_q=query.drop_vars("q").assign(q=xr.concat([query["q"], one], "d_head")),
        text_k=key.drop_vars("k").assign(k=xr.concat([key["k"], all_alike], "d_head")),
    )
    statistics = [WEIGHTS, entropy_statistic()]
    plain = attention_statistics(RUN, statistics).to_array().values
    np.testing.assert_allclose(
        attention_statistics(shifted, statistics).to_array().values, plain, atol=abs(shift) * 1e-6
    )


def test_statistics__one_walk_equals_several_calls() -> None:
    together = attention_statistics(RUN, [entropy_statistic(), mass_statistic(), concentration_statistic(2)])
    assert all(isinstance(variable.data, da.Array) for variable in together.data_vars.values())
    xr.testing.assert_equal(together["attention_entropy"], attention_entropy(RUN)["attention_entropy"])
    for name, variable in attention_mass(RUN).items():
        xr.testing.assert_allclose(together[name], variable)


def test_statistics__one_walk_multiplies_once() -> None:
    calls: list[int] = []

    def count(rows: AttentionRows) -> np.ndarray[Any, Any]:
        calls.append(rows.scores.shape[0])
        return np.zeros((*rows.scores.shape[:2], 2), np.float32)

    attention_statistics(RUN, [RowStatistic({"a": {}, "b": {}}, count)], layer=0).compute()
    assert len(calls) == 12 * 2, "once for each sample and key head"


def test_statistics__a_subset_of_heads_needs_to_know_its_keys() -> None:
    query = site(RUN, "text/q").isel(head=[1, 3])
    with pytest.raises(FormatError, match=r"2 heads for 2 key heads.*\n.*heads_per_kv_head"):
        attention_entropy(with_groups(RUN, text_q=query))
    told = with_groups(RUN, text_q=query.assign_attrs(heads_per_kv_head=2))
    expected = attention_entropy(RUN)["attention_entropy"].isel(head=[1, 3])
    xr.testing.assert_equal(attention_entropy(told)["attention_entropy"].compute(), expected.compute())
    few = with_groups(told, text_k=site(RUN, "text/k").isel(kv_head=[0]))
    with pytest.raises(DataError, match="key heads 1, which heads of text/q read"):
        attention_entropy(few)


def test_statistics__selects_layers_samples_and_tokens() -> None:
    whole = attention_entropy(RUN)
    part = attention_entropy(RUN, layer=[3, 1], sample=[2, 7], tokens="last+'?'")
    owner, text = whole["sample_index"].values, whole["token_text"].values
    rows = np.isin(owner, [2, 7]) & (whole["is_last_prompt"].values | (text == "?"))
    expected = whole.isel(token=np.flatnonzero(rows)).sel(layer=[3, 1])
    xr.testing.assert_allclose(part.compute(), expected.compute())


def test_statistics__result_has_one_chunking() -> None:
    assert attention_entropy(RUN, max_bytes=12_000).chunksizes["token"]


def test_statistics__errors_name_what_is_there() -> None:
    without = xr.DataTree.from_dict(
        {n.path: n.to_dataset(inherit=False) for n in RUN.subtree if n.path != "/text/q"}
    )
    with pytest.raises(MissingSiteError, match=r"no 'text/q'; it holds .*text/k"):
        attention_entropy(without)
    with pytest.raises(SpecificationError, match="no layer 9; there are 0, 1, 2, 3"):
        attention_entropy(RUN, layer=9)
    with pytest.raises(DataError, match="sample 99 has no such tokens"):
        attention_entropy(RUN, sample=99)
    with pytest.raises(DataError, match="layer 0, which text/q has"):
        attention_entropy(with_groups(RUN, text_k=site(RUN, "text/k").isel(layer=[1, 2, 3])))


def test_statistics__refuses_incomplete_keys() -> None:
    key = site(RUN, "text/k")
    with pytest.raises(DataError, match="holds the tokens 'text' only"):
        attention_entropy(with_groups(RUN, text_k=key.assign_attrs(tokens="text")))
    odd = key.isel(token=np.flatnonzero(key["position"].values != 2))
    with pytest.raises(DataError, match="keys of sample 0 are not complete"):
        attention_entropy(with_groups(RUN, text_k=odd)).compute()


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_statistics__names_the_sample_and_layer_of_what_is_not_finite(name: str, value: float) -> None:
    group = site(RUN, f"text/{name}")
    row = int(np.flatnonzero(group["sample_index"].values == 6)[0])
    values = group[name].values.copy()
    values[2, row, 0, 0] = value
    bad = with_groups(
        RUN, **{f"text_{name}": group.assign({name: (group[name].dims, values)}).chunk(layer=1, token=11)}
    )
    with pytest.raises(DataError, match="sample 6 is not finite in layer 2"):
        attention_entropy(bad).compute()
    assert np.isfinite(attention_entropy(bad, layer=[0, 1, 3])["attention_entropy"].values).all()
