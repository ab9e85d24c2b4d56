"""How far attention looks."""

from __future__ import annotations

import dask.array as da
import numpy as np
import xarray as xr
from run_groups import stacked_attention, tokens_of
from synthetic_run import Plan, synthetic_run

from mechanistic.analysis.attention_distance import attention_distance


def uniform(**changes: object) -> xr.DataTree:
    """Every allowed key gets the same weight."""
    run = synthetic_run(Plan(query_tokens="all", mask="bidirectional", **changes))  # type: ignore[arg-type]
    run["text/q"]["q"] = run["text/q"]["q"] * 0
    return run


def test_attention_distance__by_hand() -> None:
    run = uniform(grid=2)
    found = attention_distance(run, sample=0, layer=0).compute()
    length = found.sizes["token"]
    np.testing.assert_allclose(
        found["attention_distance"].values[0, 0], np.full(4, np.arange(length).mean()), rtol=1e-6
    )
    # From a corner of a 2 x 2 grid: itself, two neighbours at 1, one at the diagonal.
    patches = found["attention_patch_distance"].values[0, 1:5]
    np.testing.assert_allclose(patches, (0 + 1 + 1 + np.sqrt(2)) / 4, rtol=1e-6)
    assert np.isnan(found["attention_patch_distance"].values[0, [0, 5, -1]]).all()


def test_attention_distance__plain_definition() -> None:
    run = synthetic_run(query_tokens="all", grid=3)
    lazy = attention_distance(run)
    assert all(isinstance(variable.data, da.Array) for variable in lazy.data_vars.values())
    found = lazy.compute()
    mine = found["sample_index"].values == 6
    weights, tokens = stacked_attention(run, 6), tokens_of(run, 6)
    place = tokens["position"].values
    apart = np.abs(place[:, None] - place[None, :])
    expected = (weights * apart).sum(-1).transpose(0, 2, 1)
    np.testing.assert_allclose(found["attention_distance"].values[:, mine], expected, atol=1e-4)
    cells = np.stack([tokens["patch_row"].values, tokens["patch_col"].values], -1)[1:10].astype(float)
    steps = np.linalg.norm(cells[:, None] - cells[None, :], axis=-1)
    inner = weights[:, :, 1:10, 1:10]
    expected = (inner * steps).sum(-1) / inner.sum(-1)
    np.testing.assert_allclose(
        found["attention_patch_distance"].values[:, mine][:, 1:10], expected.transpose(0, 2, 1), atol=1e-5
    )


def test_attention_distance__another_tile_is_another_grid() -> None:
    run = uniform(grid=2)
    for name in ("text/q", "text/k"):
        tile = run[name]["tile"].values.copy()
        tile[run[name]["position"].values > 2] = 1
        run[name] = xr.DataTree(run[name].to_dataset().assign_coords(tile=("token", tile)))
    found = attention_distance(run, sample=1, layer=0)["attention_patch_distance"].values
    # Patches 0 and 1 share a tile and are neighbours.
    np.testing.assert_allclose(found[0, 1:3], 0.5, rtol=1e-6)


def test_attention_distance__blocks_do_not_matter() -> None:
    run = synthetic_run(query_tokens="all")
    small = attention_distance(run, max_bytes=12_000)
    assert len(small.chunks["token"]) > len(attention_distance(run).chunks["token"])
    xr.testing.assert_identical(small.compute(), attention_distance(run).compute())
