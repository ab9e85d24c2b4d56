"""attribution_sparsity: by hand, as outside formulas, by sample, lazy as eager."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_models import llava, samples

from mechanistic.analysis import attribution_sparsity, gradcam, integrated_gradients
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

RANDOM = np.random.default_rng(0).normal(size=(3, 4, 17))


@pytest.mark.parametrize(
    ("measure", "alike", "one", "hand"),
    # Of (4, -3, 2, -1): p = .4 .3 .2 .1; 1 - 2 (.4/2 + .3 * 3/2 + .2 * 5/2 + .1 * 7/2) / 4; |p|^2 = .3.
    [
        ("gini", 0.0, 0.75, 0.25),
        ("hoyer", 0.0, 1.0, 2 - 1 / np.sqrt(0.3)),
        ("feature_share", 1.0, 0.25, 0.75),
    ],
)
def test_attribution_sparsity__by_hand(measure: Any, alike: float, one: float, hand: float) -> None:
    values = np.array([[2.0, -2, 2, -2], [0, 0, -5, 0], [4, -3, 2, -1]])
    got = attribution_sparsity(values, measure=measure)
    np.testing.assert_allclose(got, [alike, one, hand], rtol=0, atol=1e-6)
    as_tensor = attribution_sparsity(torch.tensor(values, dtype=torch.bfloat16), measure=measure)
    np.testing.assert_allclose(as_tensor, got, rtol=0, atol=1e-6)


def test_attribution_sparsity__is_the_mean_difference_and_the_norms() -> None:
    size = np.abs(RANDOM)
    n = size.shape[-1]
    differences = np.abs(size[..., :, None] - size[..., None, :]).mean((-1, -2))
    gini = differences / size.mean(-1) / 2
    np.testing.assert_allclose(attribution_sparsity(RANDOM), gini, rtol=0, atol=1e-6)
    hoyer = (np.sqrt(n) - size.sum(-1) / np.sqrt((size**2).sum(-1))) / (np.sqrt(n) - 1)
    np.testing.assert_allclose(attribution_sparsity(RANDOM, measure="hoyer"), hoyer, rtol=0, atol=1e-6)
    share = [
        [next(m for m in range(1, n + 1) if np.sort(row)[-m:].sum() >= 0.5 * row.sum()) / n for row in each]
        for each in size
    ]
    got = attribution_sparsity(RANDOM, measure="feature_share", mass=0.5)
    np.testing.assert_allclose(got, share, rtol=0, atol=1e-6)


def test_attribution_sparsity__of_each_sample_by_itself() -> None:
    found = integrated_gradients(llava(), samples(3), to="token_embeddings", steps=2)
    got = attribution_sparsity(found)["attribution_gini"]
    assert got.dims == ("sample",)
    for number in range(3):
        mine = found["integrated_gradients"].values[found["sample_index"].values == number]
        np.testing.assert_allclose(got[number], attribution_sparsity(mine), rtol=0, atol=1e-6)
    cam = gradcam(llava(), samples(1))
    np.testing.assert_allclose(
        attribution_sparsity(cam["gradcam"])["attribution_gini"],
        attribution_sparsity(cam)["attribution_gini"],
    )


def test_attribution_sparsity__is_the_same_lazily() -> None:
    labelled = xr.DataArray(
        RANDOM, dims=("layer", "head", "token"), coords={"sample_index": ("token", np.arange(17) // 6)}
    )
    eager = attribution_sparsity(labelled)["attribution_gini"]
    lazy = attribution_sparsity(labelled.chunk(layer=1, token=5))["attribution_gini"]
    assert lazy.chunks is not None
    assert eager.dims == ("layer", "head", "sample")
    np.testing.assert_array_equal(lazy, eager)
    plain = attribution_sparsity(labelled.drop_vars("sample_index"), measure="hoyer")["attribution_hoyer"]
    np.testing.assert_array_equal(plain, attribution_sparsity(RANDOM, measure="hoyer"))


def test_attribution_sparsity__of_nothing_is_nan() -> None:
    np.testing.assert_array_equal(attribution_sparsity(np.zeros((2, 5))), [np.nan, np.nan])


def test_attribution_sparsity__says_what_is_wrong() -> None:
    with pytest.raises(SpecificationError, match=r"no measure of sparsity 'l0'"):
        attribution_sparsity(RANDOM, measure="l0")  # type: ignore[call-overload]
    with pytest.raises(SpecificationError, match="mass is 1"):
        attribution_sparsity(RANDOM, mass=1)
    with pytest.raises(DataError, match="1 of 3 values are NaN"):
        attribution_sparsity([1.0, np.nan, 2.0])
    with pytest.raises(DimensionError, match="last axis of features"):
        attribution_sparsity(np.zeros((3, 0)))
    with pytest.raises(DimensionError, match="no attribution that is known"):
        attribution_sparsity(xr.Dataset({"mine": ("token", RANDOM[0, 0])}))
    with pytest.raises(DimensionError, match="one number"):
        attribution_sparsity(xr.DataArray(3.0))
