"""Dissimilarity matrices: equal to definitions and other libraries, block by block, and unbiased."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import LedoitWolf
from synthetic_run import RELATIONS, synthetic_run, with_groups

from mechanistic.analysis import rdm_graph, representation_rows, with_samples
from mechanistic.analysis.noise_covariance import Scatter, ledoit_wolf_shrinkage
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
# Of the small arrays here: all rows of a layer may be held, or only the means of conditions.
HELD, UNHELD = 1 << 28, 800
METRICS = ("correlation", "euclidean", "mahalanobis", "crossnobis")


def rows(values: Any, chunk: int | None = None, **labels: Any) -> xr.DataArray:
    """An array (layer, row, feature) with labels on its rows, lazy in blocks of `chunk` rows."""
    array = xr.DataArray(
        values,
        {"layer": np.arange(len(values)) + 4, **{name: ("row", column) for name, column in labels.items()}},
        ("layer", "row", "feature"),
    )
    return array if chunk is None else array.chunk(layer=1, row=chunk)


def repeated(conditions: int = 6, repeats: int = 8, features: int = 5, seed: int = 3) -> xr.DataArray:
    """Conditions measured several times, half of them in each of two sessions, in mixed order."""
    rng = np.random.default_rng(seed)
    condition = np.repeat(np.arange(conditions), repeats)
    session = np.tile(np.arange(repeats) % 2, conditions)
    mixing = rng.normal(size=(features, features))
    values = rng.normal(size=(2, conditions, features))[:, condition]
    values = values + rng.normal(size=values.shape) @ mixing * 0.3
    order = rng.permutation(len(condition))
    return rows(
        values[:, order], word=np.array([f"c{number}" for number in condition])[order], session=session[order]
    )


def matrix(data: Any, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(representational_dissimilarity(data, **options)["dissimilarity"].values)


@pytest.fixture(params=["whole", "blocks", "unheld"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """`max_bytes` for one block, for blocks of four rows that tasks share, for such that each reads again."""
    if request.param != "whole":
        monkeypatch.setattr(representation_rows, "MIN_BLOCK_ROWS", 1)
        monkeypatch.setattr(representation_rows, "BLOCK_ROWS", 4)
        monkeypatch.setattr(rdm_graph, "BLOCK_ROWS", 4)
    return UNHELD if request.param == "unheld" else HELD


def test_rdm__by_hand() -> None:
    three = rows([[[0.0, 0.0, 3.0], [0.0, 3.0, 0.0], [6.0, 0.0, 0.0]]])
    # |x_i - x_j|^2 is 18, 45, 45, over three features.
    np.testing.assert_allclose(matrix(three, metric="euclidean")[0], [[0, 6, 15], [6, 0, 15], [15, 15, 0]])
    # Centred, all are permutations of (2, -1, -1): r = -1/2.
    np.testing.assert_allclose(matrix(three)[0], [[0, 1.5, 1.5], [1.5, 0, 1.5], [1.5, 1.5, 0]])


def test_rdm__crossnobis_by_hand() -> None:
    # Differences of a and b: (2, 0) and (1, 1) in the sessions; their product is 2, over two features.
    data = rows(
        [[[2.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]], word=["a", "b", "a", "b"], session=[0, 0, 1, 1]
    )
    options = {
        "metric": "crossnobis",
        "conditions": "word",
        "partitions": "session",
        "covariance": "identity",
    }
    np.testing.assert_allclose(matrix(data, **options)[0], [[0, 1], [1, 0]])


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


def test_rdm__shrinks_as_scikit_learn_does(blocks: int) -> None:
    data = repeated()
    found = matrix(data, metric="mahalanobis", conditions="word", max_bytes=blocks)
    for place, values in enumerate(data.values):
        words = data["word"].values
        means = np.stack([values[words == word].mean(axis=0) for word in np.unique(words)])
        residual = values - means[np.unique(words, return_inverse=True)[1]]
        fitted = LedoitWolf(assume_centered=True).fit(residual)
        precision = np.linalg.inv(fitted.covariance_ * len(residual) / (len(residual) - len(means)))
        expected = squareform(pdist(means, "mahalanobis", VI=precision)) ** 2 / 5
        np.testing.assert_allclose(found[place], expected, rtol=1e-9, atol=1e-12)
        scatter = Scatter(5)
        scatter.add(residual, np.zeros(len(residual), int), np.zeros((1, 5)))
        assert ledoit_wolf_shrinkage(scatter) == pytest.approx(fitted.shrinkage_)


def definition_of_crossnobis(values: Any, words: Any, sessions: Any, precision: Any) -> np.ndarray[Any, Any]:
    names, parts = np.unique(words), np.unique(sessions)
    means = np.array([[values[(words == w) & (sessions == s)].mean(axis=0) for w in names] for s in parts])
    found = np.zeros((len(names), len(names)))
    pairs = [(m, n) for m in range(len(parts)) for n in range(len(parts)) if m != n]
    for i in range(len(names)):
        for j in range(len(names)):
            products = [
                (means[m, i] - means[m, j]) @ precision @ (means[n, i] - means[n, j]) for m, n in pairs
            ]
            found[i, j] = np.mean(products) / values.shape[1]
    return found


@pytest.mark.parametrize("sessions", [2, 3])
def test_rdm__crossnobis_is_the_mean_over_pairs_of_partitions(sessions: int, blocks: int) -> None:
    data = repeated(repeats=6)
    order = np.argsort(data["word"].values, kind="stable")
    session = np.tile(np.arange(6) % sessions, 6)[np.argsort(order)]
    data = data.assign_coords(session=("row", session))
    options = {"metric": "crossnobis", "conditions": "word", "partitions": "session", "max_bytes": blocks}
    plain = matrix(data, covariance="identity", **options)
    for place, values in enumerate(data.values):
        expected = definition_of_crossnobis(values, data["word"].values, session, np.eye(5))
        np.testing.assert_allclose(plain[place], expected, atol=1e-12)
    assert (plain == plain.transpose(0, 2, 1)).all()


def test_rdm__equals_rsatoolbox() -> None:
    rsatoolbox = pytest.importorskip("rsatoolbox")
    data = repeated(conditions=7, repeats=4)
    found = {
        metric: matrix(data, metric=metric, conditions="word", partitions="session") for metric in METRICS
    }
    for place, values in enumerate(data.values):
        labels = {"word": data["word"].values, "session": data["session"].values}
        dataset = rsatoolbox.data.Dataset(values, obs_descriptors=labels)
        noise = rsatoolbox.data.noise.prec_from_unbalanced(dataset, "word", method="shrinkage_eye")
        for metric in METRICS:
            options = {"noise": noise} if metric in ("mahalanobis", "crossnobis") else {}
            options |= {"cv_descriptor": "session"} if metric == "crossnobis" else {}
            expected = rsatoolbox.rdm.calc_rdm(dataset, method=metric, descriptor="word", **options)
            np.testing.assert_allclose(
                found[metric][place], expected.get_matrices()[0], rtol=1e-9, atol=1e-12
            )


def test_rdm__recovers_planted_distances_without_bias() -> None:
    rng = np.random.default_rng(5)
    places = np.array([0.0, 1.0, 2.0, 2.0])
    truth = np.zeros((4, 6))
    truth[:, 2] = places
    condition, session = np.repeat(np.arange(4), 2), np.tile([0, 1], 4)
    # Two hundred little experiments, one a layer: what is biased in each is biased in their mean.
    data = rows(truth[condition] + 0.5 * rng.normal(size=(200, 8, 6)), word=condition, session=session)
    options = {"conditions": "word", "partitions": "session", "covariance": "identity"}
    unbiased = matrix(data, metric="crossnobis", **options)
    expected = (places[:, None] - places[None, :]) ** 2 / 6
    np.testing.assert_allclose(unbiased.mean(axis=0), expected, atol=0.06)
    assert unbiased[:, 2, 3].min() < 0
    assert matrix(data, metric="euclidean", conditions="word")[:, 2, 3].mean() > 0.2


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


def test_rdm__random_partitions_keep_samples_whole_and_even() -> None:
    data = repeated().assign_coords(sample_index=("row", np.arange(48) // 2))
    data = data.sortby("word").assign_coords(sample_index=("row", np.arange(48) // 2))
    first = matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=1)
    assert (first == matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=1)).all()
    assert (first != matrix(data, metric="crossnobis", conditions="word", partitions=2, seed=2)).any()


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


def test_rdm__refuses_a_singular_covariance() -> None:
    few = rows(RNG.normal(size=(1, 4, 9)), word=["a", "a", "b", "b"])
    with pytest.raises(DataError, match="noise covariance of layer 4 cannot be inverted"):
        matrix(few, metric="mahalanobis", conditions="word", shrinkage=0)
    assert np.isfinite(matrix(few, metric="mahalanobis", conditions="word")).all()


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
    with pytest.raises(DimensionError, match=r"\(layer, token, head, d_head\)"):
        representational_dissimilarity(run, site="text/q")
    with pytest.raises(DimensionError, match="one floating array"):
        representational_dissimilarity(group(run, "samples"))


def test_rdm__runs_under_a_distributed_client(blocks: int) -> None:
    distributed = pytest.importorskip("distributed")
    data = repeated()
    options: dict[str, Any] = {"metric": "crossnobis", "conditions": "word", "max_bytes": blocks}
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        found = matrix(data.chunk(row=5), **options)
    np.testing.assert_allclose(found, matrix(data, **options), rtol=1e-12)
