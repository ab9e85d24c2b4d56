"""Class means, relation axes, principal components and projections: by hand, scikit-learn, planted truth."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from synthetic_run import RELATIONS, synthetic_run

from mechanistic.analysis import representation_rows, with_samples
from mechanistic.analysis.directions import class_directions, direction_cosines, project_rows
from mechanistic.analysis.linear_probe import linear_probe
from mechanistic.analysis.principal_components import principal_components
from mechanistic.store import site
from mechanistic.store.errors import DataError, DimensionError

AXES = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(2, 15, 6)) @ RNG.normal(size=(6, 6)) + 5
PLANTED = synthetic_run(sets=30, direction_layer=2)


def rows(values: Any, **labels: Any) -> xr.DataArray:
    coords = {
        "layer": np.arange(len(values)) + 3,
        **{name: ("row", column) for name, column in labels.items()},
    }
    return xr.DataArray(values, coords, ("layer", "row", "feature"))


def test_directions__by_hand() -> None:
    values = np.array([[[0.0, 0], [2, 0], [4, 0], [1, 3], [9, 9]]])
    data = rows(values, word=["a", "a", "b", "c", ""])
    found = class_directions(data, target="word", axes={"x": ("a", "b"), "y": ("a", "c")})
    np.testing.assert_allclose(found["class_mean"].values[0], [[1, 0], [4, 0], [1, 3]])
    np.testing.assert_allclose(found["direction"].values[0], [[3, 0], [0, 3]])
    np.testing.assert_allclose(found["separation"].values[0], [3, 3])
    np.testing.assert_allclose(found["cosine"].values[0], np.eye(2))
    assert found["n_row"].values.tolist() == [2, 1, 1]
    assert int(found["n_excluded"]) == 1
    every = class_directions(data, target="word")
    assert every["axis"].values.tolist() == ["b - a", "c - a", "c - b"]
    assert every["cosine"].sel(axis="b - a", other_axis="c - b").item() == pytest.approx(-np.sqrt(0.5))


def test_directions__means_of_values_whose_sum_single_precision_does_not_hold() -> None:
    data = rows(np.full((1, 4, 2), 3e38, np.float32), word=["a", "a", "b", "b"])
    found = class_directions(data, target="word", axes={"x": ("a", "b")})
    np.testing.assert_array_equal(found["class_mean"].values, np.full((1, 2, 2), np.float32(3e38)))


def test_directions__find_the_planted_axis_in_its_layer_only() -> None:
    found = class_directions(PLANTED, target="relation", axes=AXES).compute()
    separation = found["separation"]
    assert (separation.sel(layer=2) > 5 * separation.sel(layer=[0, 1, 3]).max()).all()
    assert found["class_mean"]["class"].values.tolist() == sorted(RELATIONS)
    probe = linear_probe(PLANTED, target="relation").compute()["coefficient"]
    ends = [probe.sel({"class": [ends[side] for ends in AXES.values()]}).values for side in (0, 1)]
    trained = found["direction"].copy(data=ends[1] - ends[0])
    cosine = direction_cosines(found["direction"], trained)["cosine"].sel(layer=2)
    assert float(cosine.sel(axis="horizontal", other_axis="horizontal")) > 0.6


def test_directions__project_rows_by_hand() -> None:
    data = rows(np.array([[[3.0, 4], [0, 1]]]))
    directions = xr.DataArray([[0.0, 2], [1, 1], [0, 0]], {"axis": ["up", "diagonal", "none"]}, ("axis", "d"))
    found = project_rows(data, directions)["projection"]
    assert found.dims == ("layer", "row", "axis")
    root = np.sqrt(2)
    np.testing.assert_allclose(found.values[0], [[4, 7 / root, np.nan], [1, 1 / root, np.nan]], rtol=1e-6)
    origin = xr.DataArray([[1.0, 1]], {"layer": [3]}, ("layer", "d"))
    moved = project_rows(data, directions, origin=origin)["projection"]
    np.testing.assert_allclose(moved.values[0, :, :2], [[3, 5 / root], [0, -1 / root]], rtol=1e-6)


def test_directions__transfer_to_another_run() -> None:
    found = class_directions(PLANTED, target="relation", axes=AXES)
    again = synthetic_run(sets=5, direction_layer=2)
    projected = project_rows(again, found["direction"], labels=["relation"])["projection"]
    assert isinstance(projected.data, da.Array)
    means = projected.compute().sel(layer=2, axis="horizontal").groupby("relation").mean()
    assert set(means["relation"].values) == set(RELATIONS)
    one = project_rows(again, found["direction"].sel(layer=2, axis=["vertical"]), layer=2)["projection"]
    np.testing.assert_allclose(one.values[0, :, 0], projected.sel(layer=2, axis="vertical").values, rtol=1e-5)


@pytest.mark.parametrize("count", [15, 5])
@pytest.mark.parametrize("held", [True, False])
def test_principal_components__equal_scikit_learn(count: int, held: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(representation_rows, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(representation_rows, "BLOCK_ROWS", 4)
    values = VALUES[:, :count]
    found = principal_components(rows(values), components=3, max_bytes=1 << 28 if held else 1)
    for place, own in enumerate(values):
        theirs = PCA(3, svd_solver="full").fit(own)
        signs = np.sign(
            np.take_along_axis(theirs.components_, np.abs(theirs.components_).argmax(1)[:, None], 1)
        )
        np.testing.assert_allclose(found["direction"].values[place], theirs.components_ * signs, atol=1e-5)
        np.testing.assert_allclose(
            found["explained_variance"].values[place], theirs.explained_variance_, rtol=1e-5
        )
        np.testing.assert_allclose(
            found["explained_share"].values[place], theirs.explained_variance_ratio_, rtol=1e-5
        )
        np.testing.assert_allclose(found["mean"].values[place], theirs.mean_, rtol=1e-6)
    scores = project_rows(rows(values), found["direction"], origin=found["mean"])["projection"]
    np.testing.assert_allclose(scores.values[1], theirs.transform(values[1]) * signs.T, atol=1e-4)


def test_principal_components__find_the_planted_plane() -> None:
    found = principal_components(PLANTED, components=4).compute()
    share = found["explained_share"].sum("component")
    assert float(share.sel(layer=2)) > float(share.sel(layer=[0, 1, 3]).max()) + 0.2
    assert found["direction"].dims == ("layer", "component", "d_model")
    assert int(found["n_row"]) == 120


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 15), st.integers(1, 6), st.integers(1, 2), st.booleans())
def test_directions__any_chunking_gives_the_same(row: int, feature: int, layer: int, held: bool) -> None:
    data = rows(VALUES, word=["a", "b", "c"] * 5)
    lazy = data.chunk(row=row, feature=feature, layer=layer)
    limit = 1 << 28 if held else 1
    expected = class_directions(data, target="word")
    found = class_directions(lazy, target="word")
    components = principal_components(lazy, components=2, max_bytes=limit)
    projected = project_rows(lazy, expected["direction"])
    for result in (found, components, projected):
        assert all(isinstance(v.data, da.Array) for v in result.data_vars.values() if "layer" in v.dims)
    xr.testing.assert_allclose(found.compute(), expected, rtol=1e-5)
    eager = principal_components(data, components=2)
    assert isinstance(eager["direction"].data, np.ndarray)
    xr.testing.assert_allclose(components.compute(), eager, rtol=1e-4, atol=1e-5)
    xr.testing.assert_allclose(projected.compute(), project_rows(data, expected["direction"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda d: class_directions(d, target="one"), DataError, "'one' has one class only, 'x', in 15 rows"),
        (
            lambda d: class_directions(d, target="colour"),
            DimensionError,
            "no label 'colour'; they have word, one",
        ),
        (
            lambda d: class_directions(d, target="word", axes={"z": ("a", "q")}),
            DimensionError,
            "'word' has no class 'q'; it has a, b, c",
        ),
        (
            lambda d: principal_components(d, components=9),
            DataError,
            "9 components were asked of 15 rows with 6",
        ),
        (
            lambda d: project_rows(d, d[:, :2, :4]),
            DimensionError,
            "the rows have 6 features, the directions 4",
        ),
        (lambda d: project_rows(d, d[:1, :2]), DimensionError, "no directions for layer 4"),
        (lambda d: direction_cosines(d[0]), DimensionError, r"these are \(row, feature\)"),
        (lambda d: direction_cosines(d, d[..., :3]), DimensionError, "have 6 and 3 features"),
        (lambda d: direction_cosines(d[:1], d[1:]), DimensionError, "no layer in common"),
    ],
)
def test_directions__refuse(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(rows(VALUES, word=["a", "b", "c"] * 5, one=["x"] * 15))


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_directions__name_what_is_not_finite_or_constant(strange: float) -> None:
    broken = VALUES.copy()
    broken[1, 4, 2] = strange
    data = rows(broken, word=["a", "b", "c"] * 5, sample_index=np.arange(15) + 50)
    for call in (
        lambda: class_directions(data, target="word"),
        lambda: principal_components(data, components=2),
    ):
        with pytest.raises(DataError, match="layer 4 holds NaN or infinity in 1 rows, of sample 54"):
            call()
    directions = class_directions(rows(VALUES, word=["a", "b", "c"] * 5), target="word")["direction"]
    projected = project_rows(data.chunk(layer=1, feature=3), directions)["projection"]
    with pytest.raises(DataError, match="layer 4 holds NaN or infinity in 1 rows, of sample 54"):
        projected.compute()
    assert np.isfinite(projected.sel(layer=3).values).all()
    constant = np.ones((1, 5, 3)) * 0.1
    with pytest.raises(DataError, match="all rows of layer 3 are the same"):
        principal_components(rows(constant), components=1)


def test_directions__rows_of_tokens_carry_columns_of_their_samples() -> None:
    found = class_directions(PLANTED, target="patch_row", tokens="image", layer=0)
    assert found["class"].values.tolist() == [0, 1]
    labelled = with_samples(site(PLANTED, "text/resid_post_last"), PLANTED, ["relation"])
    direct = class_directions(labelled, target="relation", axes=AXES)
    xr.testing.assert_allclose(
        direct.compute(), class_directions(PLANTED, target="relation", axes=AXES).compute()
    )
