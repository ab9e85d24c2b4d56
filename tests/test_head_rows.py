"""Dissimilarities and CKA of every head of every layer in one call are those of the heads one by one."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from synthetic_run import synthetic_run

from mechanistic.analysis import linear_cka, open_dissimilarity, plot_rdm, representational_dissimilarity
from mechanistic.store.errors import DimensionError

LAYERS, HEADS = [2, 5], [1, 3, 4]


def heads(name: str = "head") -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(2, 24, 3, 6)).astype(np.float32)
    coords = {"layer": LAYERS, name: HEADS, "relation": ("sample", np.tile(list("abcd"), 6).astype(object))}
    return xr.DataArray(values, coords, ("layer", "sample", name, "d_head"), name="z")


@pytest.mark.parametrize("metric", ["correlation", "crossnobis"])
def test_rdm_of_heads__equals_one_head_after_the_other(metric: str) -> None:
    rows = heads()
    whole = representational_dissimilarity(rows, metric=metric, conditions="relation")  # type: ignore[arg-type]
    assert whole["dissimilarity"].dims == ("layer", "head", "condition", "other")
    assert (whole["layer"].values.tolist(), whole["head"].values.tolist()) == (LAYERS, HEADS)
    for head in HEADS:
        one = representational_dissimilarity(
            rows.sel(head=head, drop=True),
            metric=metric,  # type: ignore[arg-type]
            conditions="relation",
        )
        xr.testing.assert_allclose(whole.sel(head=head).drop_vars("head"), one)


def test_rdm_of_heads__lazy_equals_eager_and_is_written_in_blocks(tmp_path: Path) -> None:
    rows = heads("kv_head")
    eager = representational_dissimilarity(rows)
    lazy = representational_dissimilarity(rows.chunk(layer=1, sample=7))
    assert isinstance(lazy["dissimilarity"].data, da.Array)
    assert lazy["dissimilarity"].data.chunks[:2] == ((1, 1), (1, 1, 1))
    xr.testing.assert_allclose(lazy.compute(), eager)
    representational_dissimilarity(rows, layer=5, save=tmp_path / "rdm.zarr")
    xr.testing.assert_allclose(
        open_dissimilarity(tmp_path / "rdm.zarr")["dissimilarity"], eager["dissimilarity"].sel(layer=[5])
    )
    with pytest.raises(DimensionError, match="3 matrices, one a kv_head"):
        plot_rdm(eager, layer=2)
    plot_rdm(eager.sel(kv_head=3), layer=2)


def test_cka_of_heads__every_pair_of_heads() -> None:
    rows = heads()
    whole = linear_cka(rows)
    assert whole["cka"].dims == ("layer", "head", "other_layer", "other_head")
    for head in HEADS:
        for other in HEADS:
            one, two = (rows.sel(head=number, drop=True) for number in (head, other))
            expected = linear_cka(one, two)["cka"].values
            here = whole["cka"].sel(head=head, other_head=other)
            np.testing.assert_allclose(here.transpose("layer", "other_layer"), expected, atol=1e-6)
    mixed = linear_cka(rows, rows.sel(head=3, drop=True))
    assert mixed["cka"].dims == ("layer", "head", "other_layer")
    np.testing.assert_allclose(mixed["cka"], whole["cka"].sel(other_head=3), atol=1e-6)


def test_heads_of_a_run() -> None:
    run = synthetic_run()
    result = representational_dissimilarity(run, site="text/q", tokens="last", conditions="relation")
    assert dict(result["dissimilarity"].sizes) == {"layer": 4, "head": 4, "condition": 4, "other": 4}
    keys = linear_cka(run, site="text/k", tokens="last").compute()
    np.testing.assert_allclose(np.diag(keys["cka"].values.reshape(8, 8)), 1)
