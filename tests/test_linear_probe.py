"""Linear probes: planted directions are found where they are, nothing leaks, controls are at chance."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic_run import RELATIONS, synthetic_run, with_groups

from mechanistic.analysis import linear_probe, with_samples
from mechanistic.analysis.probe_design import ProbeDesign, probe_design
from mechanistic.store import group, site
from mechanistic.store.errors import DataError, DimensionError, MissingSiteError, SpecificationError

PLANTED = synthetic_run(sets=30, direction_layer=3)


def last_rows(run: xr.DataTree = PLANTED) -> xr.Dataset:
    return with_samples(site(run, "text/resid_post_last"), run, ["relation", "group", "correct", "status"])


def design(rows: xr.Dataset, target: str = "relation", **options: Any) -> ProbeDesign:
    return probe_design(rows, target, **({"folds": 5, "repetitions": 8, "seed": 0} | options))


def test_probe_design__sets_stay_in_one_fold() -> None:
    laid = design(last_rows())
    for number in np.unique(laid.sets):
        assert len(np.unique(laid.fold[laid.sets == number])) == 1
    assert np.bincount(laid.fold).tolist() == [24] * 5
    assert laid.classes == (sorted(RELATIONS),)


def test_probe_design__shuffles_within_sets() -> None:
    laid = design(last_rows())
    assert laid.shuffled == "samples within their set"
    for number in np.unique(laid.sets):
        rows = laid.codes[laid.sets == number]
        assert (np.sort(rows, axis=0) == np.arange(4)[:, None, None]).all()
    assert 0.15 < (laid.codes[:, 1:] == laid.codes[:, :1]).mean() < 0.35


def test_probe_design__shuffles_labels_of_sets_among_sets() -> None:
    rows = last_rows()
    half = np.where(np.arange(120) < 60, "a", "b")
    laid = design(rows.assign_coords(half=("sample", half)), "half")
    assert laid.shuffled == "sets among all sets"
    for number in np.unique(laid.sets):
        assert (laid.codes[laid.sets == number] == laid.codes[laid.sets == number][0]).all()
    assert (laid.codes.sum(axis=0) == 60).all()


def test_probe_design__shuffles_token_labels_within_samples() -> None:
    laid = design(site(PLANTED, "text/resid_post"), "kind")
    assert laid.shuffled == "tokens within their sample"
    for sample in range(5):
        rows = laid.codes[laid.samples == sample]
        assert (np.sort(rows, axis=0) == np.sort(rows[:, :1], axis=0)).all()


def test_probe_design__leaves_out_and_counts_rows_without_a_label() -> None:
    rows = last_rows()
    relation = rows["relation"].values.copy()
    relation[:3] = ""
    status = rows["status"].values.copy()
    status[4] = 1
    laid = design(rows.assign_coords(relation=("sample", relation), status=("sample", status)))
    assert laid.excluded == 4
    assert laid.rows[:2].tolist() == [3, 5]


def test_probe_design__samples_without_a_set_are_their_own() -> None:
    empty = last_rows().assign_coords(group=("sample", np.array([""] * 120, object)))
    assert len(np.unique(design(empty).sets)) == 120
    assert len(np.unique(design(last_rows().drop_vars("group")).sets)) == 120


def test_linear_probe__finds_the_planted_layer_only() -> None:
    probe = linear_probe(PLANTED, target="relation").compute()
    accuracy = probe["accuracy"].values
    assert accuracy[3] > 0.97
    assert (accuracy[:3] < 0.4).all()
    assert (probe["accuracy_low"].values <= accuracy).all()
    assert (probe["accuracy_high"].values >= accuracy).all()
    assert probe["chance"] == 0.25
    assert (abs(probe["shuffled_accuracy"].values - 0.25) < 0.05).all()
    assert (probe["shuffled_accuracy_low"] < 0.25).all()
    assert (probe["shuffled_accuracy_high"] > 0.25).all()
    assert [int(probe[name]) for name in ("n_sample", "n_row", "n_set", "n_excluded")] == [120, 120, 30, 0]


def test_linear_probe__finds_the_planted_token_only() -> None:
    mark = linear_probe(PLANTED, target="relation", tokens="'?'", layer=3).compute()
    assert float(mark["accuracy"].item()) < 0.45
    assert mark["prediction"].dims == ("layer", "token")


def test_linear_probe__is_lazy() -> None:
    probe = linear_probe(PLANTED, target="relation")
    for name in ("accuracy", "shuffled_accuracy", "prediction", "coefficient", "penalty"):
        assert isinstance(probe[name].data, da.Array), name
    rows = last_rows().compute()
    eager = linear_probe(rows, target="relation")
    assert isinstance(eager["accuracy"].data, np.ndarray)
    xr.testing.assert_allclose(eager, probe.compute().drop_vars(set(probe.coords) - set(eager.coords)))


@pytest.mark.parametrize("width", [12, 200])
def test_linear_probe__equals_a_scikit_learn_loop(width: int) -> None:
    rows = last_rows(synthetic_run(sets=15, direction_layer=3, direction_strength=0.4, d_model=width))
    probe = linear_probe(rows, target="relation", penalties=(0.1,), repetitions=2).compute()
    laid = design(rows, repetitions=2)
    features, hits = rows["resid_post_last"].values, np.zeros((4, 60, 3), bool)
    for layer in range(4):
        for number in range(5):
            train, test = laid.fold != number, laid.fold == number
            for labelling, codes in enumerate(laid.codes[..., 0].T):
                model = make_pipeline(StandardScaler(), RidgeClassifier(0.1 * train.sum()))
                model.fit(features[layer, train], codes[train])
                hits[layer, test, labelling] = model.predict(features[layer, test]) == codes[test]
    np.testing.assert_allclose(probe["accuracy"], hits[..., 0].mean(1), atol=1e-12)
    np.testing.assert_allclose(probe["shuffled_accuracy"], hits[..., 1:].mean((1, 2)), atol=1e-12)


def test_linear_probe__streamed_equals_whole() -> None:
    whole = linear_probe(PLANTED, target="kind", tokens="all", layer=[0, 3], repetitions=3).compute()
    streamed = linear_probe(
        PLANTED, target="kind", tokens="all", layer=[0, 3], repetitions=3, max_bytes=12 * 4 * 100
    ).compute()
    assert int(whole["n_row"]) > 1000
    assert (whole["prediction"] == streamed["prediction"]).mean() > 0.999
    np.testing.assert_allclose(whole["coefficient"], streamed["coefficient"], atol=1e-4)
    np.testing.assert_allclose(whole["accuracy"], streamed["accuracy"], atol=2e-3)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 120), st.integers(1, 12), st.integers(1, 4), st.sampled_from([20, 50, 120]))
def test_linear_probe__any_chunking_gives_the_same(row: int, feature: int, layer: int, held: int) -> None:
    rows = last_rows().compute()
    whole = linear_probe(rows, target="relation", repetitions=1)
    cut = rows.chunk(sample=row, d_model=feature, layer=layer)
    found = linear_probe(cut, target="relation", repetitions=1, max_bytes=12 * 4 * held).compute()
    # Rounding may turn a row whose two best scores are as good as equal.
    assert float((found["prediction"] == whole["prediction"]).mean()) > 0.99
    np.testing.assert_allclose(found["shuffled_accuracy"], whole["shuffled_accuracy"], atol=0.01)
    np.testing.assert_allclose(found["coefficient"], whole["coefficient"], atol=1e-4)


def test_linear_probe__reads_every_row_once() -> None:
    reads: list[int] = []

    def record(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        reads.append(block.shape[1])
        return block

    rows = last_rows().copy()
    data = rows["resid_post_last"].data.map_blocks(record, meta=np.empty((0, 0, 0), np.float32))
    rows["resid_post_last"] = (rows["resid_post_last"].dims, data)
    lazy = linear_probe(rows, target="relation", repetitions=1)
    assert reads == []
    lazy.compute()
    assert sum(reads) == 4 * 120
    reads.clear()
    linear_probe(rows, target="relation", repetitions=1, max_bytes=12 * 4 * 50).compute()
    assert sum(reads) == 2 * 4 * 120, "larger layers are read again rather than kept"


def test_linear_probe__directions_transfer_to_another_run() -> None:
    trained = linear_probe(PLANTED, target="relation", layer=3).compute().isel(layer=0)
    # The same seed plants the same directions in other samples' rows.
    features = site(PLANTED, "text/resid_post_last")["resid_post_last"].sel(layer=3).values
    scores = features @ trained["coefficient"].values.T + trained["intercept"].values
    named = trained["class"].values[scores.argmax(1)]
    assert (named == group(PLANTED, "samples")["relation"].values).mean() > 0.97


def test_linear_probe__the_last_token_is_read_from_its_own_group() -> None:
    plain = with_groups(PLANTED, text_other=site(PLANTED, "text/resid_post"))
    through_tokens = linear_probe(plain, target="relation", site="text/other", repetitions=2).compute()
    through_group = linear_probe(PLANTED, target="relation", repetitions=2).compute()
    assert through_tokens["prediction"].dims == ("layer", "token")
    assert through_group["prediction"].dims == ("layer", "sample")
    np.testing.assert_array_equal(through_tokens["prediction"], through_group["prediction"])


def test_linear_probe__takes_an_estimator() -> None:
    estimator = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    probe = linear_probe(PLANTED, target="relation", estimator=estimator, repetitions=2).compute()
    ridge = linear_probe(PLANTED, target="relation", repetitions=2).compute()
    assert abs(float(probe["accuracy"][3] - ridge["accuracy"][3])) < 0.02
    assert "coefficient" not in probe
    with pytest.raises(DataError, match="needs all 120 rows of a layer at once"):
        linear_probe(PLANTED, target="relation", estimator=estimator, max_bytes=1000)


def test_linear_probe__errors() -> None:
    with pytest.raises(DimensionError, match=r"no column 'colour'; they have .*relation"):
        linear_probe(PLANTED, target="colour")
    with pytest.raises(DimensionError, match=r"no label 'colour'; they have relation, group"):
        linear_probe(last_rows(), target="colour")
    with pytest.raises(MissingSiteError, match="no 'text/mlp_out'"):
        linear_probe(PLANTED, target="relation", site="text/mlp_out")
    with pytest.raises(DataError, match="'status' has one class, 'ok', in 120 rows"):
        linear_probe(PLANTED, target="status")
    with pytest.raises(DataError, match="class 'above' occurs in 3 sets, but each of 5 folds"):
        linear_probe(synthetic_run(), target="relation")
    with pytest.raises(
        DataError, match=r"'above' occurs in 1 set, but each of 5 folds .*\n  Leave out the rows"
    ):
        linear_probe(synthetic_run(sets=1), target="relation")
    with pytest.raises(SpecificationError, match="'box_x0' is continuous; logistic"):
        linear_probe(PLANTED, target="box_x0", tokens="image", method="logistic")
    with pytest.raises(SpecificationError, match="no method 'svm'"):
        linear_probe(PLANTED, target="relation", method="svm")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="box_x0, patch_row are not all classes or all continuous"):
        linear_probe(PLANTED, target=["box_x0", "patch_row"], tokens="image")
    with pytest.raises(SpecificationError, match=r"penalties is \(0.0,\)"):
        linear_probe(PLANTED, target="relation", penalties=(0,))
    with pytest.raises(DataError, match="no value of 'group' is in two folds"):
        linear_probe(PLANTED, target="relation", control="group")
    with pytest.raises(SpecificationError, match="folds is 2"):
        linear_probe(PLANTED, target="relation", folds=2)
    with pytest.raises(SpecificationError, match="repetitions is 0"):
        linear_probe(PLANTED, target="relation", repetitions=0)
    with pytest.raises(SpecificationError, match="no layer 9"):
        linear_probe(PLANTED, target="relation", layer=9)
    stacked = site(PLANTED, "text/q").expand_dims("side", axis=2)
    with pytest.raises(DimensionError, match=r"these data have q \('layer', 'token', 'side', 'head'"):
        linear_probe(stacked, target="kind")


@pytest.mark.parametrize("max_bytes", [1 << 28, 12 * 4 * 50])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_linear_probe__names_the_sample_and_layer_of_what_is_not_finite(value: float, max_bytes: int) -> None:
    rows = last_rows().compute()
    rows["resid_post_last"][2, 77, 5] = value
    lazy = linear_probe(rows.chunk(layer=1), target="relation", max_bytes=max_bytes)
    with pytest.raises(DataError, match="layer 2 holds NaN or infinity in 1 rows, of sample 77"):
        lazy.compute()
