"""Linear CKA: the definitions in full matrices, both routes, invariances, two runs of the same samples."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from synthetic_run import synthetic_run, with_groups

from mechanistic.analysis.cka import linear_cka
from mechanistic.analysis.compare_rdms import compare_rdms
from mechanistic.analysis.rdm import representational_dissimilarity
from mechanistic.store import group
from mechanistic.store.errors import DataError, DimensionError

ROUTES = ("gram", "covariance")
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(3, 12, 5)) @ RNG.normal(size=(5, 5)) + 2


def rows(values: Any, **labels: Any) -> xr.DataArray:
    coords = {"layer": np.arange(len(values)), **{name: ("row", column) for name, column in labels.items()}}
    return xr.DataArray(values, coords, ("layer", "row", "feature"))


def table(first: Any, second: Any = None, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(linear_cka(first, second, **options)["cka"].values)


def hsic(first: Any, second: Any) -> float:
    """Song et al. (2012), equation 5, as it is written."""
    n = len(first)
    k, m = (gram - np.diag(np.diag(gram)) for gram in (first, second))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3)))


def definition(x: Any, y: Any, debiased: bool) -> float:
    if debiased:
        k, m = x @ x.T, y @ y.T
        return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def test_cka__by_hand() -> None:
    # Centred, the columns are (1, 1, -1, -1) and (1, -1, 1, -1): orthogonal. Their sum shares half with each.
    one, two = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    data = rows(np.stack([one, two, one + two])[..., None] + 7)
    expected = [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]
    for route in ROUTES:
        np.testing.assert_allclose(table(data, debiased=False, route=route), expected, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("debiased", [False, True])
def test_cka__equals_the_definition(route: Any, debiased: bool) -> None:
    other = RNG.normal(size=(2, 12, 7)) + VALUES[:2, :, :1]
    own = table(rows(VALUES), debiased=debiased, route=route)
    between = table(rows(VALUES), rows(other), debiased=debiased, route=route)
    assert between.shape == (3, 2)
    for a in range(3):
        for b in range(3):
            assert own[a, b] == pytest.approx(definition(VALUES[a], VALUES[b], debiased), abs=1e-10)
        for b in range(2):
            assert between[a, b] == pytest.approx(definition(VALUES[a], other[b], debiased), abs=1e-10)


def test_cka__is_the_cosine_of_whitened_dissimilarities() -> None:
    data = rows(VALUES)
    rdm = representational_dissimilarity(data, metric="euclidean")
    expected = compare_rdms(rdm, method="whitened")["similarity"].values
    np.testing.assert_allclose(table(data, debiased=False), expected, atol=1e-10)


def test_cka__does_not_see_rotation_scale_or_shift() -> None:
    turned = 3 * VALUES @ ortho_group.rvs(5, random_state=0) + np.arange(5)
    for debiased in (False, True):
        np.testing.assert_allclose(table(rows(VALUES), rows(turned), debiased=debiased).diagonal(), 1)


def test_cka__debiased_is_zero_for_unrelated_rows() -> None:
    unrelated = rows(np.random.default_rng(3).normal(size=(2, 60, 400)))
    assert table(unrelated, debiased=False)[0, 1] > 0.7
    assert abs(table(unrelated)[0, 1]) < 0.05


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.sampled_from(ROUTES), st.booleans())
def test_cka__any_chunking_gives_the_same(row: int, feature: int, layer: int, route: Any, held: bool) -> None:
    lazy = linear_cka(
        rows(VALUES).chunk(row=row, feature=feature, layer=layer),
        route=route,
        max_bytes=1 << 28 if held else 1,
    )
    assert isinstance(lazy["cka"].data, da.Array)
    np.testing.assert_allclose(lazy["cka"].values, table(rows(VALUES)), atol=1e-10)


def test_cka__tiles_cover_all_rows() -> None:
    many = rows(np.random.default_rng(1).normal(size=(2, 150, 4)).astype(np.float32))
    expected = table(many.astype(np.float64), route="covariance")
    np.testing.assert_allclose(table(many, route="gram", max_bytes=1), expected, atol=1e-5)
    np.testing.assert_allclose(table(many), expected, atol=1e-5)


def test_cka__of_runs_is_labelled() -> None:
    run = synthetic_run(sets=6, direction_layer=2)
    cka = linear_cka(run, synthetic_run(sets=6, direction_layer=3, layers=(1, 3)))
    assert isinstance(cka["cka"].data, da.Array)
    assert (cka["layer"].values.tolist(), cka["other_layer"].values.tolist()) == ([0, 1, 2, 3], [1, 3])
    assert int(cka["n_row"]) == 24
    # What both say is the relation, each in one layer and along directions of its own.
    found = cka["cka"].compute()
    assert float(found.sel(layer=2, other_layer=3)) > 0.5
    assert float(abs(found.sel(other_layer=1)).max()) < 0.3
    assert cka.attrs["tokens"] == "last"


def test_cka__refuses_other_samples() -> None:
    run = synthetic_run(sets=3)
    with pytest.raises(DataError, match="the first has 12 rows, the second 16"):
        linear_cka(run, synthetic_run(sets=4))
    renamed = group(run, "samples").compute()
    renamed["sample_id"].values[5] = "another"
    with pytest.raises(DataError, match="row 5 is sample-5 in the first, another in the second"):
        linear_cka(run, with_groups(run, samples=renamed))
    numbered = rows(VALUES, sample_index=np.arange(12))
    with pytest.raises(
        DataError, match="2 rows are not of the same sample: row 0 is 0 in the first, 1 in the"
    ):
        linear_cka(numbered, numbered.isel(row=[1, 0, *range(2, 12)]))


def test_cka__refuses_too_few_rows_and_layers_that_are_constant() -> None:
    with pytest.raises(DataError, match="3 rows are too few"):
        linear_cka(rows(VALUES[:, :3]))
    constant = VALUES.copy()
    constant[1] = [1.1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="all rows of layer 1 are the same"):
        linear_cka(rows(constant))
    with pytest.raises(DimensionError, match=r"\(layer, row, feature\)"):
        linear_cka(rows(VALUES).isel(layer=0))


@pytest.mark.parametrize("route", ROUTES)
def test_cka__names_what_is_not_finite(route: Any) -> None:
    broken = VALUES.copy()
    broken[2, 7, 1] = np.inf
    with pytest.raises(DataError, match="layer 2 holds NaN or infinity in 1 rows, of sample 107"):
        linear_cka(rows(broken, sample_index=np.arange(12) + 100), route=route)
