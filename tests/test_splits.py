"""Splits: sample columns on rows, means by sample, summaries with intervals and sizes."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import synthetic_run

from mechanistic.analysis import attention_mass, sample_means, summarize, with_samples
from mechanistic.analysis.intervals import bootstrap_interval, t_interval
from mechanistic.analysis.splits import row_labels
from mechanistic.store import group, site
from mechanistic.store.errors import DimensionError

RUN = synthetic_run()


def rows_by_hand() -> xr.Dataset:
    values = xr.DataArray(np.array([[1.0, 3.0, 10.0, 20.0, 30.0, 5.0]]), dims=("layer", "token"))
    dataset = xr.Dataset({"value": values.assign_attrs(units="nat")}, {"layer": [7]})
    return dataset.assign_coords(
        sample_index=("token", np.array([0, 0, 2, 2, 2, 3])),
        correct=(
            "token",
            np.array([1, 1, 0, 0, 0, 1]),
            {"flag_values": [0, 1], "flag_meanings": "wrong right"},
        ),
        word=("token", np.array(["a", "b", "a", "b", "b", "a"])),
    )


def test_with_samples__looks_up_each_row() -> None:
    rows = with_samples(site(RUN, "text/q"), RUN, ["relation", "correct"])
    assert isinstance(rows["relation"].data, da.Array)
    samples = group(RUN, "samples")
    owner = rows["sample_index"].values
    assert (rows["relation"].values == samples["relation"].values[owner]).all()
    assert (rows["correct"].values == samples["correct"].values[owner]).all()
    assert rows["correct"].attrs["flag_meanings"] == "unscored incorrect correct"


def test_with_samples__rows_may_be_the_samples() -> None:
    rows = with_samples(site(RUN, "text/resid_post_last"), RUN, "relation")
    assert (rows["relation"].values == group(RUN, "samples")["relation"].values).all()


def test_with_samples__errors() -> None:
    rows = site(RUN, "text/q")
    with pytest.raises(DimensionError, match=r"no column 'colour'; they have sample_id, .*relation"):
        with_samples(rows, RUN, "colour")
    with pytest.raises(DimensionError, match="already have a 'relation'"):
        with_samples(with_samples(rows, RUN, "relation"), RUN, "relation")
    with pytest.raises(DimensionError, match="belong to no known sample"):
        with_samples(rows.drop_vars("sample_index"), RUN, "relation")


def test_sample_means__by_hand() -> None:
    means = sample_means(rows_by_hand())
    assert means["value"].dims == ("layer", "sample")
    assert means["value"].values.tolist() == [[2, 20, 5]]
    assert means["sample_index"].values.tolist() == [0, 2, 3]
    assert means["value"].attrs["units"] == "nat"


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(2, 100))
def test_sample_means__lazy_equals_eager_for_any_chunks(chunk: int) -> None:
    rows = site(RUN, "text/q")[["q"]]
    eager = sample_means(rows.compute())
    lazy = sample_means(rows.isel(layer=[0]).chunk(token=chunk))
    assert isinstance(lazy["q"].data, da.Array)
    np.testing.assert_allclose(lazy["q"].values, eager["q"].values[:1], atol=1e-6)


def test_summarize__by_hand() -> None:
    summary = summarize(rows_by_hand(), by="correct")
    assert summary["correct"].values.tolist() == ["wrong", "right"]
    assert summary["n_sample"].values.tolist() == [1, 2]
    assert summary["value"].values.tolist() == [[20], [3.5]]
    low, high = t_interval(np.array([2.0, 5.0]))
    np.testing.assert_allclose(summary["value_low"].values, [[np.nan], [low]])
    np.testing.assert_allclose(summary["value_high"].values, [[np.nan], [high]])
    assert summary["value_low"].attrs["units"] == "nat"


def test_summarize__a_table_of_two_labels_counts_empty_cells() -> None:
    summary = summarize(rows_by_hand().sel(token=[0, 2, 3, 5]), by=["correct", "word"])
    assert summary["value"].dims == ("correct", "word", "layer")
    assert summary["n_sample"].values.tolist() == [[1, 1], [2, 0]]
    np.testing.assert_array_equal(summary["value"].values[..., 0], [[10, 20], [3, np.nan]])
    lazy = summarize(rows_by_hand().chunk(token=2).sel(token=[0, 2, 3, 5]), by=["correct", "word"])
    assert isinstance(lazy["value"].data, da.Array)
    xr.testing.assert_equal(lazy.compute(), summary)


def test_summarize__equals_xarray_groupby() -> None:
    mass = with_samples(attention_mass(RUN, tokens="last"), RUN, "relation")
    summary = summarize(mass, by="relation")
    assert isinstance(summary["mass_image"].data, da.Array)
    expected = mass.compute().groupby("relation").mean("token")
    actual = summary["mass_image"].compute()
    xr.testing.assert_allclose(
        actual.transpose(*expected["mass_image"].dims), expected["mass_image"].astype(float)
    )
    assert summary["n_sample"].values.tolist() == [3, 3, 3, 3]


def test_summarize__bootstraps_whole_sets() -> None:
    mass = with_samples(attention_mass(RUN, tokens="last"), RUN, ["correct", "group"])[["mass_image"]]
    summary = summarize(mass, method="bootstrap", clusters="group", resamples=200, seed=4)
    values = mass["mass_image"].transpose("layer", "head", "token").values
    low, high = bootstrap_interval(values, clusters=mass["group"].values, resamples=200, seed=4)
    np.testing.assert_allclose(summary["mass_image_low"].values, low)
    np.testing.assert_allclose(summary["mass_image_high"].values, high)
    assert int(summary["n_sample"]) == 12


def test_summarize__nan_is_not_averaged_away() -> None:
    rows = rows_by_hand()
    rows["value"][0, 3] = np.nan
    assert np.isnan(summarize(rows)["value"].values).all()


def test_summarize__errors() -> None:
    with pytest.raises(DimensionError, match=r"no label 'relation'; they have .*word"):
        summarize(rows_by_hand(), by="relation")
    with pytest.raises(DimensionError, match="no numbers on 'token'"):
        summarize(rows_by_hand().drop_vars("value"))


def test_row_labels__enumerations_have_names() -> None:
    column = xr.DataArray(
        np.array([1, -1, 0]), attrs={"flag_values": [-1, 0, 1], "flag_meanings": "none no yes"}
    )
    assert row_labels(column).tolist() == ["yes", "none", "no"]
    assert row_labels(xr.DataArray(np.array([1, 2]))).tolist() == [1, 2]
