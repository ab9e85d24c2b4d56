"""Comparing dissimilarity matrices: definitions, other libraries, permutation, bootstrap, noise ceiling."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dissimilarities import METHODS, pairs, random_matrices, rdms, same_or_different
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import squareform
from scipy.stats import kendalltau, pearsonr, spearmanr
from synthetic_run import synthetic_run

from mechanistic.analysis import with_samples
from mechanistic.analysis.compare_rdms import compare_rdms
from mechanistic.analysis.model_rdms import model_dissimilarity
from mechanistic.analysis.rdm import representational_dissimilarity
from mechanistic.analysis.rdm_bootstrap import resampled_similarities
from mechanistic.analysis.rdm_similarity import prepare, similarity, tau_a
from mechanistic.store.errors import DataError, DimensionError, SpecificationError


def plain_similarity(a: Any, b: Any, method: str) -> float:
    """Each definition, as other libraries or a double loop have it."""
    x, y = pairs(a), pairs(b)
    if method == "spearman":
        return float(spearmanr(x, y).statistic)
    if method == "correlation":
        return float(pearsonr(x, y).statistic)
    if method == "cosine":
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))
    if method == "kendall":
        return plain_tau_a(x, y)
    weights = np.linalg.inv(covariance_of_distances(len(a)))
    return float(x @ weights @ y / np.sqrt((x @ weights @ x) * (y @ weights @ y)))


def plain_tau_a(x: Any, y: Any) -> float:
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in combinations(range(len(x)), 2)]
    return float(np.mean(signs))


def covariance_of_distances(count: int) -> np.ndarray[Any, Any]:
    """Of squared distances between independent patterns: squares of the covariances of their differences."""
    contrasts = np.array([np.eye(count)[i] - np.eye(count)[j] for i, j in combinations(range(count), 2)])
    return np.asarray((contrasts @ contrasts.T) ** 2)


def test_compare_rdms__by_hand() -> None:
    # Pairs (ab, ac, bc) in the order 1 2 3, and 1 3 2: one of three pairs of pairs is discordant.
    first = squareform([1.0, 2.0, 3.0])
    second = squareform([1.0, 3.0, 2.0])
    data, model = rdms(first[None]), rdms(second[None], "model")
    found = {method: compare_rdms(data, model, method=method)["similarity"].item() for method in METHODS}
    assert found["spearman"] == pytest.approx(0.5)
    assert found["kendall"] == pytest.approx(1 / 3)
    assert found["cosine"] == pytest.approx(13 / 14)
    assert found["correlation"] == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_compare_rdms__equals_the_definition(method: Any) -> None:
    left, right = random_matrices(2), random_matrices(3, seed=1)
    right[2] = same_or_different([0, 0, 1, 1, 2, 2, 2, 0])
    left[1] = np.round(left[1])
    table = compare_rdms(rdms(left), rdms(right, "model"), method=method)["similarity"]
    assert table.dims == ("layer", "model")
    for place in np.ndindex(2, 3):
        expected = plain_similarity(left[place[0]], right[place[1]], method)
        assert float(table[place]) == pytest.approx(expected, abs=1e-12)


def test_compare_rdms__tau_a_of_two_values_equals_the_general_one() -> None:
    (matrix,) = random_matrices(1, conditions=12)
    model = same_or_different(np.arange(12) % 3)
    for a, b in ((np.round(matrix), model), (model, matrix), (model, same_or_different(np.arange(12) % 4))):
        fast = similarity(prepare(a, "kendall"), prepare(b, "kendall"), "kendall")
        assert fast == pytest.approx(tau_a(pairs(a), pairs(b)), abs=1e-12)
        assert fast == pytest.approx(plain_tau_a(pairs(a), pairs(b)), abs=1e-12)
    assert tau_a(pairs(matrix), pairs(matrix)) == pytest.approx(
        kendalltau(pairs(matrix), pairs(matrix)).statistic
    )


def test_compare_rdms__equals_rsatoolbox() -> None:
    import rsatoolbox

    left, right = random_matrices(2), random_matrices(3, seed=1)
    theirs = [rsatoolbox.rdm.RDMs(values) for values in (left, right)]
    names = {"spearman": "spearman", "kendall": "tau-a", "cosine": "cosine", "correlation": "corr"}
    for method, name in {**names, "whitened": "cosine_cov"}.items():
        expected = rsatoolbox.rdm.compare(*theirs, method=name)
        found = compare_rdms(rdms(left), rdms(right, "model"), method=method)  # type: ignore[arg-type]
        np.testing.assert_allclose(found["similarity"].values, expected, atol=1e-12)


def test_compare_rdms__layers_with_layers() -> None:
    table = compare_rdms(rdms(random_matrices(3)))["similarity"]
    assert table.dims == ("layer", "other_layer")
    np.testing.assert_allclose(np.diag(table), 1)
    np.testing.assert_allclose(table.values, table.values.T)


def test_compare_rdms__heads() -> None:
    values = random_matrices(6).reshape(2, 3, *random_matrices(1).shape[1:])
    heads = xr.Dataset({"dissimilarity": (("layer", "head", "condition", "other"), values)})
    heads = heads.assign_coords(layer=[4, 7], head=[0, 1, 5])
    models = rdms(random_matrices(2, seed=1), "model")
    found = compare_rdms(heads.chunk(layer=1, head=1), models)["similarity"]
    assert found.dims == ("layer", "head", "model")
    assert isinstance(found.data, da.Array)
    one = compare_rdms(heads.sel(head=5), models)["similarity"]
    np.testing.assert_allclose(found.sel(head=5).values, one.values)
    spare = compare_rdms(heads, models, max_bytes=6 * 8 * values.shape[-1] ** 2)["similarity"]
    np.testing.assert_allclose(found.values, spare.values)
    own = compare_rdms(heads)["similarity"]
    assert own.dims == ("layer", "head", "other_layer", "other_head")
    np.testing.assert_allclose(own.values.reshape(6, 6).diagonal(), 1)
    broken = heads.where((heads["layer"] < 7) | (heads["head"] < 5))
    with pytest.raises(DataError, match="layer 7, head 5"):
        compare_rdms(broken)


@pytest.mark.parametrize("method", METHODS)
def test_compare_rdms__bootstrap_equals_drawing_copies(method: Any) -> None:
    (a,), (b,) = random_matrices(1, 7), random_matrices(1, 7, seed=2)
    for model in (b, same_or_different([0, 0, 0, 1, 1, 2, 2])):
        counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=12)
        found = resampled_similarities(a, model, method, counts)
        for value, count in zip(found, counts, strict=True):
            drawn = np.repeat(np.arange(7), count)
            expected = similarity_of_copies(a, model, drawn, method)
            assert value == pytest.approx(expected, abs=1e-9, nan_ok=True)


def similarity_of_copies(a: Any, b: Any, drawn: Any, method: str) -> float:
    """Expand both matrices; pairs of copies of one condition are left out."""
    i, j = np.triu_indices(len(drawn), 1)
    kept = drawn[i] != drawn[j]
    x, y = (matrix[drawn[i], drawn[j]][kept] for matrix in (a, b))
    if method in ("spearman", "correlation", "kendall") and (np.ptp(x) == 0 or np.ptp(y) == 0):
        return np.nan
    if method == "kendall":
        return plain_tau_a(x, y)
    if method == "cosine":
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))
    if method != "whitened":
        return float({"spearman": spearmanr, "correlation": pearsonr}[method](x, y).statistic)
    # Least squares of -d/2 on row and column effects, over what is left of the square.
    row, column = np.nonzero((drawn[:, None] != drawn[None, :]) | np.eye(len(drawn), dtype=bool))
    design = np.eye(len(drawn))[row] + np.eye(len(drawn))[column]
    residuals = []
    for matrix in (a, b):
        half = -0.5 * matrix[drawn[row], drawn[column]]
        residuals.append(half - design @ np.linalg.lstsq(design, half, rcond=None)[0])
    u, v = residuals
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def test_compare_rdms__permutation_test_finds_what_is_planted_and_nothing_else() -> None:
    run = synthetic_run(sets=8, direction_layer=2)
    rdm = with_samples(representational_dissimilarity(run), run, ["relation", "group"])
    models = model_dissimilarity(rdm, same=["relation", "group"])
    table = compare_rdms(rdm, models, permutations=199, resamples=100).compute()
    found = table.sel(model="relation")
    assert float(found["p_value"].sel(layer=2)) == pytest.approx(1 / 200)
    assert float(found["similarity_low"].sel(layer=2)) > 0.2
    assert float(table["p_value"].min("layer").sel(model="group")) > 0.01
    assert (found["p_value"].sel(layer=[0, 1, 3]) > 0.01).all()
    assert (table["similarity_low"] <= table["similarity"]).all()
    assert (table["similarity_high"] >= table["similarity"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_compare_rdms__p_values_are_uniform_without_an_effect(method: Any) -> None:
    left, right = random_matrices(60, 6, seed=4), random_matrices(1, 6, seed=5)
    values = compare_rdms(rdms(left), rdms(right, "model"), method=method, permutations=39)["p_value"].values
    assert 0.35 < values.mean() < 0.65
    assert values.min() >= 1 / 40


def test_compare_rdms__reordering_both_changes_nothing() -> None:
    left, right = rdms(random_matrices(1)), rdms(random_matrices(1, seed=1), "model")
    order = np.random.default_rng(0).permutation(8)
    for method in METHODS:
        kept = compare_rdms(left, right, method=method)["similarity"]
        moved = [data.isel(condition=order, other=order) for data in (left, right)]
        np.testing.assert_allclose(compare_rdms(*moved, method=method)["similarity"], kept)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_compare_rdms__any_chunking_gives_the_same(
    condition: int, other: int, layer: int, held: bool
) -> None:
    data = rdms(random_matrices(3))
    expected = compare_rdms(data, permutations=5, resamples=5)
    lazy = data.chunk(layer=layer, condition=condition, other=other)
    found = compare_rdms(lazy, permutations=5, resamples=5, max_bytes=1 << 28 if held else 3100)
    assert isinstance(found["similarity"].data, da.Array)
    assert isinstance(expected["similarity"].data, np.ndarray)
    xr.testing.assert_allclose(found.compute(), expected)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "euclid"}, SpecificationError, "There is no method 'euclid'"),
        ({"permutations": -1}, SpecificationError, "permutations is -1"),
        ({"level": 95}, SpecificationError, "level is 95"),
        ({"max_bytes": 100}, DataError, "comparing 8 conditions needs"),
    ],
)
def test_compare_rdms__refuses_options(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compare_rdms(rdms(random_matrices(2)), **options)


def test_compare_rdms__refuses_other_conditions() -> None:
    data = rdms(random_matrices(2))
    with pytest.raises(DataError, match="the matrices have 8 and 7 conditions"):
        compare_rdms(data, data.isel(condition=slice(7), other=slice(7)))
    swapped = data.isel(condition=[1, 0, *range(2, 8)])
    with pytest.raises(
        DataError, match="differ in 2 conditions: number 0 is 0 in the first, 1 in the second"
    ):
        compare_rdms(data, swapped)
    with pytest.raises(DataError, match="2 conditions make 1 pairs"):
        compare_rdms(data.isel(condition=slice(2), other=slice(2)))
    with pytest.raises(DimensionError, match=r"there is v \(x\)"):
        compare_rdms(xr.Dataset({"v": ("x", [1.0])}))


def test_compare_rdms__refuses_what_cannot_be_compared() -> None:
    broken = random_matrices(2)
    broken[1, 2, 3] = np.nan
    with pytest.raises(
        DataError, match="of layer 1 hold 1 values that are not finite, the first of conditions 2 and 3"
    ):
        compare_rdms(rdms(broken))
    for method in METHODS:
        constant = np.zeros((1, 8, 8)) if method in ("cosine", "whitened") else np.ones((1, 8, 8)) * 0.1
        with pytest.raises(DataError, match="of model 0 are the same for all pairs"):
            compare_rdms(rdms(random_matrices(1)), rdms(constant, "model"), method=method)


def test_compare_rdms__takes_the_arrays_themselves() -> None:
    data = rdms(random_matrices(3))
    found = compare_rdms(data["dissimilarity"], data["dissimilarity"].isel(layer=[0]))
    xr.testing.assert_identical(found, compare_rdms(data, data.isel(layer=[0])))
