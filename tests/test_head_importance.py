"""The table that ranks heads."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import with_boxes, with_groups, without_groups
from scipy.stats import rankdata
from synthetic_run import synthetic_run
from test_logit_attribution import attributed_run

from mechanistic.analysis.attention_boxes import attention_boxes
from mechanistic.analysis.head_importance import head_importance, ranked
from mechanistic.analysis.intervals import bootstrap_interval
from mechanistic.analysis.logit_attribution import logit_attribution
from mechanistic.analysis.two_hop import two_hop
from mechanistic.store.errors import DimensionError, MissingSiteError, SpecificationError

BOXES = {"subject": (0, 0, 32, 32), "object": (32, 32, 64, 64)}


def make() -> xr.DataTree:
    return with_boxes(attributed_run()[0], BOXES)


def patched(values: Any, dims: tuple[str, ...], **coords: Any) -> xr.Dataset:
    return xr.Dataset({"recovered": (dims, values)}, {"layer": range(4), "head": range(4), **coords}).chunk()


def table_of(values: np.ndarray[Any, Any], **options: Any) -> tuple[Any, Any]:
    count = values.shape[1]
    return ranked(values, np.arange(count), np.zeros(len(values), bool), **options)


def test_ranked__by_hand() -> None:
    # One criterion, two samples, one layer of three heads; the last two tie.
    table, overall = table_of(np.array([[[[3.0, 1, 2]], [[5.0, 2, 1]]]]), resamples=50)
    np.testing.assert_allclose(table[0, 0, 0], [4, 1.5, 1.5])
    np.testing.assert_allclose(table[3, 0, 0], [1, 2.5, 2.5])
    np.testing.assert_allclose(overall[0, 0], [1, 2.5, 2.5])
    # The first head is first in every resample; a resample of one sample twice parts the others.
    assert table[4:, 0, 0, 0].tolist() == [1, 1]
    assert table[4, 0, 0, 1] == 2
    assert table[5, 0, 0, 1] == 3


def test_ranked__intervals_are_those_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=(2, 40, 3, 2)), np.repeat(np.arange(10), 4)
    table, _ = ranked(values, clusters, np.zeros(2, bool), resamples=400, seed=5)
    low, high = bootstrap_interval(values.transpose(0, 2, 3, 1), clusters=clusters, resamples=400, seed=5)
    np.testing.assert_allclose(table[1], low)
    np.testing.assert_allclose(table[2], high)


def test_ranked__rank_intervals_shrink_with_samples() -> None:
    rng = np.random.default_rng(0)
    true = np.linspace(0, 1, 6)[None, None]
    wide, narrow = (
        table_of((true + rng.normal(size=(count, 1, 6)))[None], resamples=300)[0] for count in (10, 1000)
    )
    assert (wide[5] - wide[4]).sum() > 2 * (narrow[5] - narrow[4]).sum()
    assert narrow[3, 0, 0].tolist() == [6, 5, 4, 3, 2, 1]


def test_ranked__what_is_unknown_takes_no_rank() -> None:
    values = np.array([[[[3.0, np.nan, 2]], [[5.0, np.nan, 1]], [[np.nan, np.nan, 3]]]])
    table, overall = table_of(values, resamples=20)
    np.testing.assert_allclose(table[0, 0, 0], [4, np.nan, 2])
    np.testing.assert_allclose(table[3, 0, 0], [1, np.nan, 2])
    assert np.isnan(overall[:, 0, 1]).all()


def test_ranked__one_cluster_has_no_interval() -> None:
    table, overall = ranked(np.ones((1, 4, 1, 2)), np.zeros(4, int), np.zeros(1, bool), resamples=20)
    assert np.isnan(table[[1, 2, 4, 5]]).all()
    assert np.isnan(overall[1:]).all()
    assert not np.isnan(overall[0]).any()


def test_head_importance__every_criterion_is_its_own_analysis() -> None:
    run = make()
    lazy = head_importance(run, resamples=50)
    assert all(isinstance(lazy[name].data, da.Array) for name in ("importance", "rank_low", "mean_rank"))
    found = lazy.compute()
    assert found["criterion"].values.tolist() == ["box_auroc", "two_hop_share", "logit_attribution"]
    boxes = attention_boxes(run).mean("token")
    expected = {
        "box_auroc": (boxes["auroc_subject"] + boxes["auroc_object"]) / 2,
        "two_hop_share": two_hop(run)["share"].mean("sample"),
        "logit_attribution": logit_attribution(run)["logit_attribution"].mean("sample"),
    }
    for name, values in expected.items():
        mine = found["importance"].sel(criterion=name)
        np.testing.assert_allclose(mine, values.transpose("layer", "head"), atol=1e-5)
        np.testing.assert_array_equal(found["rank"].sel(criterion=name), rankdata(-mine).reshape(4, 4))
    np.testing.assert_allclose(found["mean_rank"], found["rank"].mean("criterion"))
    assert found["n_sample"].values.tolist() == [12, 12, 12]
    assert found.attrs["left_out"] == {}


def test_head_importance__patching_results_join_in() -> None:
    run, rng = make(), np.random.default_rng(0)
    values = rng.normal(size=(4, 6, 4, 3))
    pairs = patched(values, ("layer", "pair", "head", "position"), sample_index=("pair", [0, 0, 2, 4, 6, 8]))
    fixed = patched(np.arange(16.0).reshape(4, 4), ("layer", "head"))
    other = xr.Dataset({"recovered": ("layer", np.ones(4))})
    run = with_groups(run, derived__swap=pairs, derived__ablate=fixed, derived__layers=other)
    found = head_importance(run, resamples=20).compute()
    assert found["criterion"].values.tolist()[3:] == ["patching_swap", "patching_ablate"]
    by_sample = values.mean(3)
    by_sample = np.concatenate([by_sample[:, :2].mean(1, keepdims=True), by_sample[:, 2:]], axis=1).mean(1)
    np.testing.assert_allclose(found["importance"].sel(criterion="patching_swap"), by_sample)
    ablated = found.sel(criterion="patching_ablate")
    assert ablated["rank"].values.ravel().tolist() == list(range(16, 0, -1))
    assert np.isnan(ablated["importance_low"]).all()
    assert found["n_sample"].values.tolist() == [12, 12, 12, 5, 0]


def test_head_importance__says_what_is_left_out() -> None:
    run = without_groups(with_boxes(synthetic_run(), BOXES), "text/resid_post_last")
    found = head_importance(run, resamples=20)
    assert found["criterion"].values.tolist() == ["box_auroc", "two_hop_share"]
    assert "no readout/" in found.attrs["left_out"]["logit_attribution"]


def test_head_importance__planted_head_comes_first() -> None:
    run, _ = attributed_run()
    readout = run["readout"].to_dataset().compute()
    # Whatever head 2 of layer 1 says speaks for 'left', and only 'left' is ever right.
    readout["head_readout"][1, 2] = 0
    readout["head_readout"][1, 2, 0, 0] = 40
    z = run["text/z"].to_dataset().compute()
    z["z"][1, :, 2, 0] = 1
    samples = run["samples"].to_dataset().assign(answer_index=("sample", np.full(12, 3, np.int8)))
    run = with_groups(run, readout=readout.chunk(), text__z=z.chunk(), samples=samples)
    found = head_importance(run, criteria=["logit_attribution"], resamples=50).compute()
    assert float(found["rank"].sel(layer=1, head=2)[0]) == 1
    assert float(found["rank_high"].sel(layer=1, head=2)[0]) == 1


def test_head_importance__errors() -> None:
    run = make()
    with pytest.raises(
        SpecificationError, match=r"no criterion gradient.*\n  There are box_auroc, two_hop_share"
    ):
        head_importance(run, criteria=["gradient"])
    with pytest.raises(MissingSiteError, match="no readout/"):
        head_importance(synthetic_run(), criteria=["logit_attribution"])
    with pytest.raises(MissingSiteError, match=r"nothing in this run says.*\n  Capture --sites"):
        head_importance(xr.DataTree.from_dict({"samples": run["samples"].to_dataset()}))
    with pytest.raises(DimensionError, match="no column 'scene'"):
        head_importance(run, clusters="scene")
    with pytest.raises(SpecificationError, match="level is 2"):
        head_importance(run, level=2)
