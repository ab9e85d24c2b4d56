"""The logit lens: by hand, against the model's own logits, over options of every kind, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import RELATIONS, synthetic_run, with_groups

from mechanistic.analysis.logit_lens import logit_lens
from mechanistic.analysis.readout import Readout
from mechanistic.store import group, open_run, site
from mechanistic.store.errors import DataError, FormatError, MissingSiteError

WIDTH = 12


def readout(seed: int = 0, words: Any = RELATIONS, **attrs: Any) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    return xr.Dataset(
        {
            "final_norm_weight": ("d_model", rng.normal(size=WIDTH).astype(np.float32)),
            "unembed": (("word", "d_model"), rng.normal(size=(len(words), WIDTH)).astype(np.float32)),
        },
        {"word": list(words)},
        {"norm_kind": "rms", "eps": 1e-5, "weight_offset": 0.0, "softcap": None} | attrs,
    )


def run_with(readout_group: xr.Dataset | None = None, options: Any = None, **changes: Any) -> xr.DataTree:
    """A run of 12 samples whose options are the relations, in an order that differs between samples."""
    run = synthetic_run(sets=3, **changes)
    samples = group(run, "samples").compute()
    if options is None:
        options = np.array([np.roll(RELATIONS, number).tolist() for number in range(12)], object)
    samples["options"] = (("sample", "option"), options)
    return with_groups(run, samples=samples, readout=readout() if readout_group is None else readout_group)


def final_states(run: xr.DataTree) -> np.ndarray[Any, Any]:
    return np.asarray(site(run, "text/resid_post_last")["resid_post_last"].values)


def test_logit_lens__by_hand() -> None:
    # |(3, 4)|^2 / 2 = 12.5; weights (1, 2): the normed residual is (3, 8) / sqrt(12.5).
    lens = Readout(
        words=("left", "right"),
        unembed=np.array([[1, 0], [0, 1]], np.float32),
        unembed_bias=np.array([0, 1], np.float32),
        weight=np.array([1, 2], np.float32),
        bias=np.array([0.5, 0], np.float32),
        kind="rms",
        eps=0.0,
        softcap=None,
    )
    root = np.sqrt(12.5)
    np.testing.assert_allclose(lens.logits(np.array([3.0, 4.0])), [3 / root + 0.5, 8 / root + 1], rtol=1e-6)


def plain_logits(values: Any, stored: xr.Dataset) -> np.ndarray[Any, Any]:
    """The formula of FORMAT.md, in double precision."""
    x = np.asarray(values, np.float64)
    if stored.attrs["norm_kind"] == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + stored.attrs["eps"])
    x = x * (stored["final_norm_weight"].values + stored.attrs["weight_offset"])
    if "final_norm_bias" in stored:
        x = x + stored["final_norm_bias"].values
    logits = x @ stored["unembed"].values.T
    if "unembed_bias" in stored:
        logits = logits + stored["unembed_bias"].values
    cap = stored.attrs["softcap"]
    return np.asarray(logits if cap is None else cap * np.tanh(logits / cap))


@pytest.mark.parametrize(
    "attrs",
    [{}, {"norm_kind": "layer"}, {"weight_offset": 1.0, "softcap": 3.0}, {"eps": 0.5, "softcap": 30.0}],
)
@pytest.mark.parametrize("biased", [False, True])
def test_logit_lens__equals_the_formula_of_the_format(attrs: Any, biased: bool) -> None:
    stored = readout(**attrs)
    if biased:
        stored["final_norm_bias"] = ("d_model", np.linspace(-1, 1, WIDTH).astype(np.float32))
        stored["unembed_bias"] = ("word", np.array([0.1, -0.4, 0.3, 1], np.float32))
    run = run_with(stored)
    expected = plain_logits(final_states(run), stored)
    found = logit_lens(run).compute()
    for sample in range(12):
        for place, option in enumerate(found["options"].values[sample]):
            logits = found["option_logit"].values[:, sample, place]
            np.testing.assert_allclose(
                logits, expected[:, sample, RELATIONS.index(option)], rtol=1e-4, atol=1e-5
            )


def test_logit_lens__numbers_follow_from_the_logits() -> None:
    run = run_with()
    lens = logit_lens(run).compute()
    logits = lens["option_logit"].values.astype(np.float64)
    weights = np.exp(logits)
    np.testing.assert_allclose(
        lens["option_probability"], weights / weights.sum(-1, keepdims=True), rtol=1e-5
    )
    answers = group(run, "samples")["answer"].values
    for sample in range(12):
        options = lens["options"].values[sample].tolist()
        right = options.index(answers[sample])
        others = np.delete(logits[:, sample], right, axis=-1).max(axis=-1)
        gap = lens["logit_gap"].values[:, sample]
        np.testing.assert_allclose(gap, logits[:, sample, right] - others, atol=1e-5)
        correct = lens["lens_correct"].values[:, sample]
        np.testing.assert_array_equal(correct, logits[:, sample].argmax(axis=-1) == right)
        held = [number for number in range(4) if correct[number]]
        stays = [number for number in range(4) if correct[number:].all()]
        np.testing.assert_equal(float(lens["first_correct_layer"][sample]), min(held, default=np.nan))
        np.testing.assert_equal(float(lens["settled_layer"][sample]), min(stays, default=np.nan))


def test_logit_lens__finds_the_planted_answer_in_its_layer_only() -> None:
    run = run_with(readout(words=RELATIONS), direction_layer=2, direction_strength=20.0)
    states = final_states(run)[2]
    relation = group(run, "samples")["relation"].values
    means = np.stack([states[relation == name].mean(axis=0) for name in RELATIONS])
    planted = readout()
    planted["final_norm_weight"][:] = 1
    planted["unembed"][:] = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    lens = logit_lens(with_groups(run, readout=planted)).compute()
    share = lens["lens_correct"].mean("sample")
    assert float(share.sel(layer=2)) == 1
    assert float(share.sel(layer=[0, 1, 3]).max()) < 0.7


def test_logit_lens__is_the_models_own_at_the_last_layer(demo_run: Path) -> None:
    run = open_run(demo_run)
    lens = logit_lens(run)
    samples = group(run, "samples")
    last = lens["option_logit"].isel(layer=-1).values
    np.testing.assert_allclose(last, samples["option_logits"].values, atol=1e-4)
    agree = lens["lens_correct"].isel(layer=-1).values == (samples["correct"].values == 1)
    assert agree.mean() > 0.99
    rising = lens["answer_probability"].mean("sample").values
    assert rising[0] < 0.3
    assert rising[-1] > 0.9
    assert (np.diff(rising) > 0).all()


def test_logit_lens__lazy_equals_eager() -> None:
    run = run_with()
    lazy = logit_lens(run, tokens="text+special", layer=[3, 1])
    assert all(isinstance(variable.data, da.Array) for variable in lazy.data_vars.values())
    held = {node.path: node.to_dataset(inherit=False).compute() for node in run.subtree}
    loaded = logit_lens(xr.DataTree.from_dict(held), tokens="text+special", layer=[3, 1])
    assert isinstance(loaded["option_logit"].data, np.ndarray)
    xr.testing.assert_allclose(lazy.compute(), loaded, rtol=1e-6)
    assert lazy["layer"].values.tolist() == [3, 1]
    assert lazy["sample_index"].dims == ("token",)
    whole = logit_lens(run, tokens="text+special").compute()
    both = whole["lens_correct"].sel(layer=[1, 3]).values == 1
    expected = np.where(both[0], 1.0, np.where(both[1], 3.0, np.nan))
    np.testing.assert_array_equal(lazy["first_correct_layer"].values, expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, WIDTH), st.integers(1, 4))
def test_logit_lens__any_chunking_gives_the_same(row: int, feature: int, layer: int) -> None:
    run = run_with()
    last = site(run, "text/resid_post_last").chunk(sample=row, d_model=feature, layer=layer)
    found = logit_lens(with_groups(run, text_resid_post_last=last)).compute()
    xr.testing.assert_allclose(found, logit_lens(run).compute(), rtol=1e-5)


def test_logit_lens__options_without_a_word_have_no_number() -> None:
    options = np.array([["left", "right", "above", ""]] * 11 + [["below", "near", "", ""]], object)
    lens = logit_lens(run_with(options=options)).compute()
    assert np.isnan(lens["option_logit"].values[:, :, 3]).all()
    assert np.isfinite(lens["option_logit"].values[:, :11, :3]).all()
    np.testing.assert_allclose(lens["option_probability"].sum("option").values, 1, rtol=1e-5)
    # `below` answers every fourth sample, but is an option of the last one only, beside an unknown word.
    unknown = np.isnan(lens["logit_gap"].values).all(axis=0)
    assert np.flatnonzero(unknown).tolist() == [3, 7, 11]
    assert np.isnan(lens["first_correct_layer"].values[[3, 7, 11]]).all()
    assert np.isnan(lens["settled_layer"].values[[3, 7, 11]]).all()


def test_logit_lens__options_that_share_a_token_have_no_number() -> None:
    run = run_with()
    samples = group(run, "samples").compute()
    stored = np.zeros((12, 4), np.float32)
    stored[5, 1:3] = np.nan
    samples["option_logits"] = (("sample", "option"), stored)
    lens = logit_lens(with_groups(run, samples=samples)).compute()
    missing = np.isnan(lens["option_logit"].values).all(axis=0)
    assert np.argwhere(missing).tolist() == [[5, 1], [5, 2]]


def test_logit_lens__open_questions_use_the_answers_of_the_run() -> None:
    lens = logit_lens(run_with(options=np.full((12, 1), "", object))).compute()
    assert lens["options"].values[0].tolist() == sorted(RELATIONS)
    assert np.isfinite(lens["logit_gap"].values).all()


def test_logit_lens__refuses() -> None:
    with pytest.raises(MissingSiteError, match="this run has no readout"):
        logit_lens(synthetic_run())
    with pytest.raises(FormatError, match="the norm 'batch'"):
        logit_lens(run_with(readout(norm_kind="batch")))
    with pytest.raises(
        DataError, match="no option of these samples is a word of the readout, which holds yes, no"
    ):
        logit_lens(run_with(readout(words=("yes", "no"))))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_logit_lens__names_what_is_not_finite(bad: float) -> None:
    run = run_with()
    last = site(run, "text/resid_post_last").compute()
    last["resid_post_last"].values[3, 8, 0] = bad
    with pytest.raises(DataError, match="layer 3 holds NaN or infinity in 1 rows, of sample 8"):
        logit_lens(with_groups(run, text_resid_post_last=last))


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_logit_lens__names_what_is_not_finite_where_no_word_looks(strange: float) -> None:
    stored = readout()
    stored["unembed"][:, 5] = 0
    run = run_with(stored)
    states = site(run, "text/resid_post_last").compute()
    states["resid_post_last"][2, 7, 5] = strange
    broken = with_groups(run, text_resid_post_last=states)
    with pytest.raises(DataError, match="layer 2 holds NaN or infinity in 1 rows, of sample 7"):
        logit_lens(broken).compute()
