"""What heads and sublayers write into the right answer's logit."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import with_groups, without_groups
from synthetic_run import RELATIONS, synthetic_run

from mechanistic.analysis.logit_attribution import logit_attribution
from mechanistic.store.errors import DataError, MissingSiteError, SpecificationError

Arrays = dict[str, np.ndarray[Any, Any]]


def attributed_run(kind: str = "rms", softcap: float | None = None) -> tuple[xr.DataTree, Arrays]:
    """A transformer of random parts whose final residual is exactly their sum, and the parts themselves.

    z and attn_out agree through W_O; the readout and the option logits are those of the final residual.
    """
    run = synthetic_run()
    rng = np.random.default_rng(3)
    tokens = run["text/resid_post"].to_dataset(inherit=False).drop_vars("resid_post")
    layers, rows, heads, d_head, d_model, words = 4, tokens.sizes["token"], 4, 8, 12, 4
    last = np.flatnonzero(tokens["is_last_prompt"].values)
    parts: Arrays = {
        "z": rng.normal(size=(layers, rows, heads, d_head)),
        "W_O": rng.normal(size=(layers, heads, d_head, d_model)) / 4,
        "mlp_out": rng.normal(size=(layers, rows, d_model)),
        "embedding": rng.normal(size=(rows, d_model)),
        "weight": rng.normal(size=d_model) + 1,
        "unembed": rng.normal(size=(words, d_model)),
        "last": last,
    }
    parts["attn_out"] = np.einsum("lthe,lhed->ltd", parts["z"], parts["W_O"])
    resid = parts["embedding"] + np.cumsum(parts["attn_out"] + parts["mlp_out"], axis=0)
    x = resid[-1][last]
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * parts["weight"]
    logits = normed @ parts["unembed"].T
    parts["logits"] = logits
    rows_of = parts["unembed"] * parts["weight"]
    rows_of = rows_of - rows_of.mean(-1, keepdims=True) if kind == "layer" else rows_of
    readout = xr.Dataset(
        {
            "final_norm_weight": ("d_model", parts["weight"] - 1),
            "unembed": (("word", "d_model"), parts["unembed"]),
            "head_readout": (
                ("layer", "head", "d_head", "word"),
                np.einsum("lhed,wd->lhew", parts["W_O"], rows_of),
            ),
        },
        {"word": np.array(RELATIONS, object), "layer": np.arange(4), "head": np.arange(4)},
        {"norm_kind": kind, "eps": 1e-6, "weight_offset": 1.0, "softcap": softcap},
    )
    samples = run["samples"].to_dataset(inherit=False)
    samples["options"] = (("sample", "option"), np.array([RELATIONS[::-1]] * 12, object))
    samples["answer_index"] = ("sample", np.array([3, 2, 1, 0] * 3, np.int8))
    shown = logits if softcap is None else softcap * np.tanh(logits / softcap)
    samples["option_logits"] = (("sample", "option"), shown[:, ::-1].astype(np.float32))
    groups: dict[str, xr.Dataset] = {"samples": samples.chunk(), "readout": readout.chunk()}
    for name, values in (
        ("attn_out", parts["attn_out"]),
        ("mlp_out", parts["mlp_out"]),
        ("resid_post", resid),
    ):
        group = tokens.assign({name: (("layer", "token", "d_model"), values.astype(np.float32))})
        groups[f"text__{name}"] = group.chunk(layer=1, token=5)
    z = tokens.assign(z=(("layer", "token", "head", "d_head"), parts["z"].astype(np.float32)))
    groups["text__z"] = z.assign_coords(head=np.arange(4)).chunk(layer=1, token=5)
    final = xr.Dataset(
        {"resid_post_last": (("layer", "sample", "d_model"), resid[:, last])}, {"layer": range(4)}
    )
    groups["text__resid_post_last"] = final.chunk(layer=1)
    return with_groups(run, **groups), parts


def difference(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Right answer against the mean of the three others; sample i has relation i mod 4."""
    right = logits[np.arange(12), np.arange(12) % 4]
    return np.asarray(right - (logits.sum(-1) - right) / 3)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_logit_attribution__all_parts_sum_to_the_logit_difference(kind: str) -> None:
    run, parts = attributed_run(kind)
    total = sum(
        logit_attribution(run, of=of)["logit_attribution"].sum("layer") for of in ("attn_out", "mlp_out")
    )
    # What is left is the embedding's own part, by the definition.
    x = (parts["embedding"] + (parts["attn_out"] + parts["mlp_out"]).sum(0))[parts["last"]]
    own = parts["embedding"][parts["last"]]
    if kind == "layer":
        x, own = (value - value.mean(-1, keepdims=True) for value in (x, own))
    scale = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    embedding = difference(own / scale * parts["weight"] @ parts["unembed"].T)
    np.testing.assert_allclose(total + embedding, difference(parts["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_logit_attribution__heads_sum_to_their_layer(kind: str) -> None:
    run, _ = attributed_run(kind)
    heads = logit_attribution(run)["logit_attribution"]
    assert isinstance(heads.data, da.Array)
    assert heads.dims == ("layer", "sample", "head")
    whole = logit_attribution(run, of="attn_out")["logit_attribution"]
    np.testing.assert_allclose(heads.sum("head"), whole, rtol=1e-4, atol=1e-4)


def test_logit_attribution__by_hand() -> None:
    run, parts = attributed_run()
    found = logit_attribution(run, layer=2).compute()
    assert found["layer"].values.tolist() == [2]
    assert found["sample_index"].values.tolist() == list(range(12))
    token, sample, head = parts["last"][5], 5, 1
    written = parts["z"][2, token, head] @ parts["W_O"][2, head]
    x = (parts["embedding"] + (parts["attn_out"] + parts["mlp_out"]).sum(0))[token]
    worth = parts["unembed"] @ (written * parts["weight"]) / np.sqrt((x**2).mean() + 1e-6)
    # Sample 5 is 'right', the second word.
    expected = worth[1] - worth[[0, 2, 3]].mean()
    assert float(found["logit_attribution"][0, sample, head]) == pytest.approx(expected, rel=1e-4)


def test_logit_attribution__softcapped_logits_are_recognised() -> None:
    run, _ = attributed_run(softcap=2.0)
    assert logit_attribution(run)["logit_attribution"].notnull().all()


def test_logit_attribution__samples_without_an_answer_are_unknown() -> None:
    run, _ = attributed_run()
    samples = run["samples"].to_dataset().compute()
    samples["answer_index"][4] = -1
    samples["options"][7, 0] = "beside"
    found = logit_attribution(with_groups(run, samples=samples.chunk()))["logit_attribution"]
    assert np.isnan(found.values).all(axis=(0, 2)).tolist() == [n in (4, 7) for n in range(12)]


def test_logit_attribution__residual_of_tokens_where_there_is_no_group_of_the_last() -> None:
    run, _ = attributed_run()
    found = logit_attribution(without_groups(run, "text/resid_post_last"))
    xr.testing.assert_allclose(found.compute(), logit_attribution(run).compute())


def test_logit_attribution__errors() -> None:
    run, parts = attributed_run()
    with pytest.raises(SpecificationError, match=r"attributed to 'v'\.\n  Choose one of z, attn_out"):
        logit_attribution(run, of="v")  # type: ignore[arg-type]
    with pytest.raises(MissingSiteError, match=r"no readout/"):
        logit_attribution(without_groups(run, "readout"))
    with pytest.raises(MissingSiteError, match=r"text/z"):
        logit_attribution(without_groups(run, "text/z"))
    readout = run["readout"].to_dataset()
    with pytest.raises(MissingSiteError, match=r"no head_readout.*\n  Attribute layers instead"):
        logit_attribution(with_groups(run, readout=readout.drop_vars("head_readout")))
    with pytest.raises(MissingSiteError, match="head_readout lacks layer 3"):
        logit_attribution(with_groups(run, readout=readout.isel(layer=slice(3))))
    early = run["text/resid_post_last"].to_dataset().isel(layer=slice(2))
    with pytest.raises(DataError, match=r"does not give the model's logits.*\n  Capture the last layer"):
        logit_attribution(with_groups(run, text__resid_post_last=early))
    samples = run["samples"].to_dataset().assign(answer_index=("sample", np.full(12, -1, np.int8)))
    with pytest.raises(DataError, match="no sample has an answer"):
        logit_attribution(with_groups(run, samples=samples))
    for name, row in {"text__z": parts["last"][11], "text__resid_post_last": 11}.items():
        rows = run[name.replace("__", "/")].to_dataset().load().copy(deep=True)
        values = next(iter(rows.data_vars.values())).values
        values[3, row] = np.nan
        with pytest.raises(DataError, match=r"layer 3 holds NaN or infinity in \d rows, of sample 11"):
            logit_attribution(with_groups(run, **{name: rows})).compute()
