"""Dissimilarity matrices: equal to definitions and other libraries, block by block, and unbiased."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dissimilarities import BLOCKINGS, HELD, METRICS, UNHELD, blocking, matrix, repeated, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from synthetic_run import RELATIONS, synthetic_run, with_groups

from mechanistic.analysis import with_samples
from mechanistic.analysis.rdm import representational_dissimilarity
from mechanistic.analysis.rdm_store import open_dissimilarity
from mechanistic.store import group
from mechanistic.store.errors import (
    DataError,
    DimensionError,
    MissingSiteError,
    OutputExistsError,
    SpecificationError,
)

RNG = np.random.default_rng(0)
PATTERNS = RNG.normal(size=(2, 9, 5)) + RNG.normal(size=5) * 3


@pytest.fixture(params=BLOCKINGS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """`max_bytes`, for every way in which rows are cut and held."""
    return blocking(request.param, monkeypatch)


def test_rdm__by_hand() -> None:
    three = rows([[[0.0, 0.0, 3.0], [0.0, 3.0, 0.0], [6.0, 0.0, 0.0]]])
    # |x_i - x_j|^2 is 18, 45, 45, over three features.
    np.testing.assert_allclose(matrix(three, metric="euclidean")[0], [[0, 6, 15], [6, 0, 15], [15, 15, 0]])
    # Centred, all are permutations of (2, -1, -1): r = -1/2.
    np.testing.assert_allclose(matrix(three)[0], [[0, 1.5, 1.5], [1.5, 0, 1.5], [1.5, 1.5, 0]])


def test_rdm__equals_scipy(blocks: int) -> None:
    data = rows(PATTERNS)
    for place, patterns in enumerate(PATTERNS):
        expected = squareform(pdist(patterns, "correlation"))
        np.testing.assert_allclose(matrix(data, max_bytes=blocks // 8)[place], expected, atol=1e-12)
        expected = squareform(pdist(patterns, "sqeuclidean")) / 5
        np.testing.assert_allclose(
            matrix(data, metric="euclidean", max_bytes=blocks // 8)[place], expected, atol=1e-12
        )
        expected = squareform(pdist(patterns, "mahalanobis")) ** 2 / 5
        found = matrix(data, metric="mahalanobis", covariance="total", shrinkage=0, max_bytes=blocks // 8)[
            place
        ]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_rdm__lazy_equals_eager_and_reads_nothing_early(blocks: int) -> None:
    def fail(block: Any) -> Any:
        raise AssertionError("read before it was asked for")

    data = repeated()
    for metric in METRICS:
        options = {"metric": metric, "conditions": "word", "max_bytes": blocks}
        lazy = representational_dissimilarity(data.chunk(layer=1, row=7), **options)
        assert isinstance(lazy["dissimilarity"].data, da.Array)
        eager = representational_dissimilarity(data, **options)
        assert isinstance(eager["dissimilarity"].data, np.ndarray)
        xr.testing.assert_allclose(lazy.compute(), eager, rtol=1e-12)
        unread = data.copy(
            data=da.map_blocks(fail, data.chunk(layer=1).data, dtype=data.dtype, meta=np.empty(0))
        )
        representational_dissimilarity(unread, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_rdm__reads_the_chosen_layer_once(metric: Any) -> None:
    seen: list[Any] = []

    def note(block: Any, block_info: Any = None) -> Any:
        seen.append(block_info[0]["chunk-location"])
        return block

    data = repeated().chunk(layer=1, row=10)
    noted = data.copy(data=da.map_blocks(note, data.data, dtype=data.dtype, meta=np.empty((0, 0, 0))))
    with dask.config.set(scheduler="synchronous"):
        matrix(noted, metric=metric, conditions="word", layer=5)
    assert sorted(seen) == [(1, number, 0) for number in range(5)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 5), st.sampled_from(METRICS), st.booleans())
def test_rdm__any_chunking_gives_the_same(row: int, feature: int, metric: Any, held: bool) -> None:
    data = repeated()
    options = {"metric": metric, "conditions": "word", "partitions": "session"}
    chunked = data.chunk(layer=2, row=row, feature=feature)
    found = matrix(chunked, max_bytes=HELD if held else UNHELD, **options)
    np.testing.assert_allclose(found, matrix(data, **options), rtol=1e-10, atol=1e-13)


def test_rdm__half_precision_is_computed_in_single() -> None:
    data = rows(PATTERNS.astype(np.float16))
    found = matrix(data, metric="euclidean")
    assert found.dtype == np.float32
    exact = matrix(data.astype(np.float64), metric="euclidean")
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_rdm__survives_a_large_common_mean() -> None:
    data = rows((PATTERNS + 1000 * RNG.normal(size=5)).astype(np.float32))
    exact = matrix(data.astype(np.float64), metric="euclidean")
    np.testing.assert_allclose(matrix(data, metric="euclidean"), exact, rtol=1e-4)
    assert (matrix(data, metric="euclidean") >= 0).all()


def test_rdm__of_a_run_is_labelled() -> None:
    run = synthetic_run(sets=6, direction_layer=2)
    rdm = representational_dissimilarity(run, conditions=["relation", "correct"], metric="euclidean")
    pairs = list(zip(rdm["relation"].values, rdm["correct"].values, strict=True))
    assert [name for name, _ in pairs] == sorted(name for name, _ in pairs)
    assert {name for _, name in pairs} <= {"incorrect", "correct"}
    assert rdm["condition"].values[0] == " | ".join(pairs[0])
    assert rdm["other_relation"].dims == ("other",)
    assert int(rdm["n_row"].sum()) == 24
    assert rdm["layer"].values.tolist() == [0, 1, 2, 3]
    assert (rdm.attrs["site"], rdm.attrs["tokens"], rdm.attrs["metric"]) == (
        "text/resid_post",
        "last",
        "euclidean",
    )


def test_rdm__finds_the_planted_layer() -> None:
    run = synthetic_run(sets=20, direction_layer=2)
    rdm = representational_dissimilarity(run, conditions="relation", metric="crossnobis").compute()
    assert set(rdm["condition"].values) == set(RELATIONS)
    mean = rdm["dissimilarity"].mean(("condition", "other"))
    assert float(mean.sel(layer=2)) > 10 * float(abs(mean.sel(layer=[0, 1, 3])).max())


def test_rdm__each_sample_keeps_its_columns() -> None:
    run = synthetic_run(sets=3)
    rdm = with_samples(representational_dissimilarity(run), run, ["relation"])
    assert rdm["relation"].dims == ("condition",)
    assert rdm.sizes["condition"] == 12
    tokens = representational_dissimilarity(run, tokens="image", layer=1, conditions="patch_row")
    assert tokens["condition"].values.tolist() == [0, 1]


def test_rdm__leaves_out_failed_samples_and_unlabelled_rows() -> None:
    run = synthetic_run(sets=3)
    samples = group(run, "samples").compute()
    samples["status"].values[2] = 1
    samples["relation"].values[0] = ""
    rdm = representational_dissimilarity(with_groups(run, samples=samples), conditions="relation")
    assert int(rdm["n_excluded"]) == 1
    assert int(rdm["n_row"].sum()) == 10


def test_rdm__is_saved_block_by_block(tmp_path: Path, blocks: int) -> None:
    data = repeated().chunk(row=5)
    saved = representational_dissimilarity(
        data, metric="euclidean", save=tmp_path / "rdm.zarr", max_bytes=blocks // 8
    )
    assert isinstance(saved["dissimilarity"].data, da.Array)
    expected = representational_dissimilarity(data.compute(), metric="euclidean")
    xr.testing.assert_allclose(saved.compute(), expected)
    xr.testing.assert_identical(open_dissimilarity(tmp_path / "rdm.zarr"), saved)
    with pytest.raises(OutputExistsError, match="exists"):
        representational_dissimilarity(data, save=tmp_path / "rdm.zarr")
    words = representational_dissimilarity(data, conditions="word", save=tmp_path / "words.zarr")
    assert words["condition"].values.tolist() == [f"c{number}" for number in range(6)]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"metric": "cosine"}, SpecificationError, "There is no metric 'cosine'"),
        ({"covariance": "none"}, SpecificationError, "There is no covariance 'none'"),
        ({"conditions": "colour"}, DimensionError, "no label 'colour'; they have word, session"),
        ({"conditions": "single"}, DataError, "there is one condition in 48 rows"),
        ({"metric": "mahalanobis"}, DataError, "condition '0' has one row"),
        ({"metric": "mahalanobis", "conditions": "lonely"}, DataError, "condition 'b' has one row"),
        (
            {"metric": "crossnobis", "conditions": "lonely"},
            DataError,
            "condition 'b' has 1 rows, none in partition 1",
        ),
        (
            {"metric": "crossnobis", "conditions": "word", "partitions": 1},
            SpecificationError,
            "one partition",
        ),
        (
            {"metric": "crossnobis", "conditions": "word", "partitions": "single"},
            SpecificationError,
            "one partition",
        ),
        (
            {"metric": "mahalanobis", "conditions": "word", "shrinkage": 2.0},
            SpecificationError,
            "shrinkage is 2.0",
        ),
        ({"conditions": "word", "max_bytes": 100}, DataError, "means of 6 conditions"),
        ({"layer": 9}, SpecificationError, "no layer 9"),
    ],
)
def test_rdm__refuses(options: Any, error: type[Exception], text: str) -> None:
    data = repeated().assign_coords(single=("row", ["x"] * 48), lonely=("row", ["a"] * 47 + ["b"]))
    with pytest.raises(error, match=text):
        representational_dissimilarity(data, **options)


def test_rdm__refuses_a_flat_pattern() -> None:
    flat = PATTERNS.copy()
    flat[1, 3] = 0.1
    with pytest.raises(DataError, match="condition '3' is the same in all features of layer 5"):
        matrix(rows(flat))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_rdm__names_what_is_not_finite(bad: float, metric: str, blocks: int) -> None:
    data = repeated().copy()
    data.values[1, 17, 2] = bad
    data = data.assign_coords(sample_index=("row", np.arange(48) + 100))
    with pytest.raises(DataError, match="layer 5 holds NaN or infinity in 1 rows, of sample 117"):
        matrix(data, metric=metric, conditions="word", max_bytes=blocks)


def test_rdm__names_a_missing_site_and_a_wrong_shape() -> None:
    run = synthetic_run()
    with pytest.raises(MissingSiteError, match="no 'text/mlp_out'"):
        representational_dissimilarity(run, site="text/mlp_out")
    with pytest.raises(DimensionError, match=r"\(layer, token\)"):
        representational_dissimilarity(group(run, "text/q")["q"].isel(head=0, d_head=0))
    with pytest.raises(DimensionError, match="one floating array"):
        representational_dissimilarity(group(run, "samples"))


def test_rdm__runs_under_a_distributed_client(blocks: int) -> None:
    import distributed

    data = repeated()
    options: dict[str, Any] = {"metric": "crossnobis", "conditions": "word", "max_bytes": blocks}
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
    ):
        found = matrix(data.chunk(row=5), **options)
    np.testing.assert_allclose(found, matrix(data, **options), rtol=1e-12)
