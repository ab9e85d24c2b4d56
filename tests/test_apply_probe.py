"""Probes applied to other rows: the planted direction transfers, unlike data is refused."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from synthetic_run import synthetic_run, with_groups

from mechanistic.analysis import linear_probe
from mechanistic.analysis.apply_probe import apply_probe
from mechanistic.store import group, site
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

PLANTED = synthetic_run(sets=30, direction_layer=3)
PROBE = linear_probe(PLANTED, target="relation", repetitions=1).compute()


def moved() -> xr.DataTree:
    """Other noise in the same rows: the directions are those of PLANTED."""
    last = site(PLANTED, "text/resid_post_last").compute()
    noise = np.random.default_rng(9).normal(size=last["resid_post_last"].shape).astype(np.float32)
    last["resid_post_last"] = last["resid_post_last"] + noise
    return with_groups(PLANTED, text_resid_post_last=last.chunk(layer=1, sample=7))


def test_apply_probe__by_hand() -> None:
    features = np.array([[[1.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 2.0]]], np.float32)
    rows = xr.Dataset(
        {"resid": (("layer", "sample", "d_model"), features)},
        {"layer": [4], "side": ("sample", np.array(["left", "right", "left", "left"], object))},
    )
    probe = xr.Dataset(
        {
            "coefficient": (("layer", "class", "d_model"), [[[1.0, 0.0], [0.0, 1.0]]]),
            "intercept": (("layer", "class"), [[0.0, 0.5]]),
        },
        {"layer": [4], "class": ["left", "right"]},
        {"target": "side"},
    )
    applied = apply_probe(probe, rows)
    assert applied["prediction"].values.tolist() == [[0, 1, 0, 1]]
    assert applied["accuracy"].values.tolist() == [0.75]
    assert float(applied["chance"]) == 0.75
    assert int(applied["n_row"]) == 4
    assert applied["layer"].values.tolist() == [4]
    one_class = apply_probe(probe, rows.isel(sample=[0, 2, 3]))
    assert one_class["accuracy"].values.tolist() == [2 / 3]
    assert one_class["prediction"].values.tolist() == [[0, 0, 1]]


def test_apply_probe__a_planted_direction_transfers() -> None:
    applied = apply_probe(PROBE, moved())
    assert isinstance(applied["accuracy"].data, da.Array)
    assert isinstance(applied["prediction"].data, da.Array)
    accuracy = applied["accuracy"].values
    assert accuracy[3] > 0.95
    assert applied["accuracy_low"][3] <= accuracy[3] <= applied["accuracy_high"][3]
    # The last token's directions say nothing at the question mark.
    elsewhere = apply_probe(PROBE.isel(layer=[3]), PLANTED, tokens="'?'")["accuracy"].values
    assert float(elsewhere.item()) < 0.45


def test_apply_probe__equals_the_product_written_out_and_any_blocks() -> None:
    run = moved()
    features = site(run, "text/resid_post_last")["resid_post_last"].values
    scores = np.einsum("lnd,lcd->lnc", features, PROBE["coefficient"].values)
    expected = (scores + PROBE["intercept"].values[:, None]).argmax(-1)
    whole, blocks = apply_probe(PROBE, run), apply_probe(PROBE, run, max_bytes=12 * 4 * 13)
    np.testing.assert_array_equal(whole["prediction"], expected)
    np.testing.assert_array_equal(blocks["prediction"], expected)
    truth = np.searchsorted(PROBE["class"].values, group(run, "samples")["relation"].values.astype(str))
    np.testing.assert_allclose(whole["accuracy"], (expected == truth).mean(1))


def test_apply_probe__heads_and_several_targets() -> None:
    probe = linear_probe(PLANTED, target="relation", site="text/q", repetitions=1).compute()
    applied = apply_probe(probe, PLANTED)
    assert applied["accuracy"].dims == ("layer", "head")
    assert applied["prediction"].dims == ("layer", "token", "head")
    several = linear_probe(PLANTED, target=["correct", "relation"], repetitions=1).compute()
    both = apply_probe(several, PLANTED)
    assert both["accuracy"].sel(target="relation", layer=3) > 0.97
    assert both["class_target"].values[both["prediction"].values[..., 1]].tolist() == [["relation"] * 120] * 4
    alone = linear_probe(PLANTED, target="correct", repetitions=1).compute()
    np.testing.assert_array_equal(
        apply_probe(alone, PLANTED)["accuracy"], both["accuracy"].sel(target="correct")
    )


def test_apply_probe__continuous() -> None:
    probe = linear_probe(PLANTED, target="box_x0", site="text/resid_post", tokens="image", repetitions=1)
    applied = apply_probe(probe.compute(), PLANTED)
    assert applied["r2"].dims == ("layer",)
    # On the rows that it was trained on least squares cannot do worse than the mean.
    assert (applied["r2"] > 0).all()
    assert "chance" not in applied


def test_apply_probe__errors() -> None:
    with pytest.raises(SpecificationError, match="no layer 2, 3; there are 0, 1"):
        apply_probe(PROBE, synthetic_run(sets=30, layers=(0, 1)))
    with pytest.raises(DimensionError, match=r"'d_model': 12\}, these features .*'d_model': 20"):
        apply_probe(PROBE, synthetic_run(sets=30, d_model=20))
    with pytest.raises(DimensionError, match="widths and heads must agree"):
        apply_probe(PROBE, PLANTED, site="text/q")
    with pytest.raises(DataError, match="not trained on 'incorrect', 'correct'; it knows 'above'"):
        apply_probe(PROBE, PLANTED, target="correct")
    with pytest.raises(DataError, match="are 1 and of classes; box_x0 is not like that"):
        apply_probe(PROBE, PLANTED, target="box_x0", site="text/resid_post", tokens="image")
    with pytest.raises(DimensionError, match="no coefficient"):
        apply_probe(PROBE.drop_vars("coefficient"), PLANTED)
    last = site(PLANTED, "text/resid_post_last").compute()
    last["resid_post_last"][1, 7, 0] = np.nan
    broken = with_groups(PLANTED, text_resid_post_last=last)
    with pytest.raises(DataError, match="layer 1 holds NaN or infinity in 1 rows, of sample 7"):
        apply_probe(PROBE, broken)
