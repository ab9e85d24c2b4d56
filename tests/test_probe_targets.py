"""Probes of heads, of continuous values, of several targets at once, and against a control task."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic_run import synthetic_run

from mechanistic.analysis import linear_probe
from mechanistic.analysis.probe_design import probe_design
from mechanistic.store.errors import DataError, DimensionError

LAYERS, SETS = 3, 30
ROWS = 4 * SETS


def heads(planted: tuple[int, int] = (1, 2), seed: int = 0) -> xr.Dataset:
    """z (layer, sample, head, d_head) with the relation in one head, an x in another layer's last head."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(LAYERS, ROWS, 4, 6)).astype(np.float32)
    relation = np.tile(np.arange(4), SETS)
    z[planted[0], :, planted[1]] += 3 * rng.normal(size=(4, 6))[relation]
    x, y = rng.uniform(0, 900, ROWS), rng.uniform(-1, 1, ROWS)
    z[2, :, 3] += np.outer(x / 100, rng.normal(size=6))
    words = np.array(["square", "circle", "cross", "star", "heart"], object)[rng.integers(5, size=ROWS)]
    return xr.Dataset(
        {"z": (("layer", "sample", "head", "d_head"), z)},
        {
            "layer": [0, 4, 9],
            "head": [0, 1, 2, 3],
            "relation": ("sample", np.array(["left", "right", "above", "below"], object)[relation]),
            "group": ("sample", (np.arange(ROWS) // 4).astype(str).astype(object)),
            "subject_x": ("sample", x),
            "object_y": ("sample", y),
            "word": ("sample", words),
        },
    )


def one_head(rows: xr.Dataset, head: int) -> xr.Dataset:
    return rows.sel(head=head, drop=True).rename(z="resid")


def test_heads__the_planted_head_only() -> None:
    probe = linear_probe(heads(), target="relation", repetitions=2)
    assert probe["accuracy"].dims == ("layer", "head")
    assert probe["coefficient"].dims == ("layer", "head", "class", "d_head")
    assert probe["prediction"].dims == ("layer", "sample", "head")
    assert probe["penalty"].dims == ("layer", "head")
    assert probe["accuracy"].sel(layer=4, head=2) > 0.95
    others = probe["accuracy"].where((probe["layer"] != 4) | (probe["head"] != 2))
    assert float(others.max()) < 0.45


def test_heads__equal_probes_of_one_head_at_a_time() -> None:
    rows = heads()
    together = linear_probe(rows, target="relation", repetitions=2)
    for head in (0, 2):
        alone = linear_probe(one_head(rows, head), target="relation", repetitions=2)
        for name in ("accuracy", "prediction", "coefficient", "shuffled_accuracy", "penalty"):
            np.testing.assert_allclose(together[name].sel(head=head).values, alone[name].values, atol=1e-6)


def test_heads__lazy_equals_eager_in_one_pass() -> None:
    rows, reads = heads(), []

    def record(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        reads.append(block.shape[1])
        return block

    lazy = rows.chunk(layer=1, sample=17)
    data = lazy["z"].data.map_blocks(record, meta=np.empty((0, 0, 0, 0), np.float32))
    lazy["z"] = (lazy["z"].dims, data)
    probe = linear_probe(lazy, target="relation", repetitions=2)
    assert isinstance(probe["accuracy"].data, da.Array)
    assert reads == []
    computed = probe.compute()
    assert sum(reads) == LAYERS * ROWS
    xr.testing.assert_allclose(computed, linear_probe(rows, target="relation", repetitions=2))
    streamed = linear_probe(lazy, target="relation", repetitions=2, max_bytes=4 * 24 * 50).compute()
    np.testing.assert_allclose(streamed["coefficient"], computed["coefficient"], atol=1e-4)


def test_continuous__equals_scikit_learn() -> None:
    rows = one_head(heads(), 3)
    probe = linear_probe(rows, target="subject_x", penalties=(0.1,), repetitions=2)
    laid = probe_design(rows, "subject_x", folds=5, repetitions=2, seed=0)
    x, predicted = rows["subject_x"].values, np.empty((LAYERS, ROWS))
    for number in range(5):
        train = laid.fold != number
        for layer in range(LAYERS):
            model = make_pipeline(StandardScaler(), Ridge(0.1 * train.sum()))
            model.fit(rows["resid"].values[layer, train], x[train])
            predicted[layer, ~train] = model.predict(rows["resid"].values[layer, ~train])
    np.testing.assert_allclose(probe["prediction"], predicted, rtol=1e-4, atol=0.02)
    np.testing.assert_allclose(probe["r2"], [r2_score(x, values) for values in predicted], atol=1e-4)
    assert probe["coefficient"].dims == ("layer", "d_head")
    assert probe["intercept"].dims == ("layer",)
    assert "chance" not in probe
    assert "accuracy" not in probe


def test_continuous__the_planted_layer_only() -> None:
    probe = linear_probe(heads(), target="subject_x", repetitions=5)
    found = probe["r2"].sel(layer=9, head=3)
    assert found > 0.9
    assert probe["r2_low"].sel(layer=9, head=3) < found < probe["r2_high"].sel(layer=9, head=3)
    assert float(probe["r2"].sel(layer=[0, 4]).max()) < 0.15
    assert float(probe["shuffled_r2"].max()) < 0.05
    assert probe.attrs["shuffled"] == "samples within their set"


def test_continuous__several_at_once_equal_one_at_a_time() -> None:
    rows = one_head(heads(), 3)
    both = linear_probe(rows, target=["subject_x", "object_y"], repetitions=2)
    assert both["r2"].dims == ("layer", "target")
    assert both["coefficient"].dims == ("layer", "target", "d_head")
    for name in ("subject_x", "object_y"):
        alone = linear_probe(rows, target=name, repetitions=2)
        np.testing.assert_allclose(both["r2"].sel(target=name), alone["r2"], atol=1e-5)
        np.testing.assert_allclose(both["penalty"].sel(target=name), alone["penalty"])


def test_continuous__rows_without_a_value_are_left_out() -> None:
    rows = one_head(heads(), 3)
    rows["subject_x"][:7] = np.nan
    probe = linear_probe(rows, target=["subject_x", "object_y"], repetitions=1)
    assert int(probe["n_excluded"]) == 7
    assert int(probe["n_row"]) == ROWS - 7
    rows["subject_x"][:] = 3.0
    with pytest.raises(DataError, match=r"'subject_x' has one class, 3\.0,"):
        linear_probe(rows, target="subject_x")


def test_several_targets__equal_one_at_a_time() -> None:
    rows = one_head(heads(), 2).assign_coords(half=("sample", np.tile([0, 0, 1, 1], SETS)))
    both = linear_probe(rows, target=["relation", "half"], repetitions=2, penalties=(0.1,))
    assert both["accuracy"].dims == ("layer", "target")
    assert both["prediction"].dims == ("layer", "sample", "target")
    assert both["class"].values.tolist() == ["above", "below", "left", "right", "0", "1"]
    assert both["class_target"].values.tolist() == ["relation"] * 4 + ["half"] * 2
    np.testing.assert_allclose(both["chance"], [0.25, 0.5])
    half = both["class"].values[both["prediction"].sel(target="half").values]
    assert (half[1] == rows["half"].values.astype(str)).mean() > 0.95
    for name in ("relation", "half"):
        own = linear_probe(rows, target=name, repetitions=2, penalties=(0.1,))
        # Folds differ where other classes are dealt out; all rows together give the same directions.
        together = both["coefficient"].values[:, both["class_target"].values == name]
        np.testing.assert_allclose(together, own["coefficient"], atol=1e-5)


def test_control__a_word_that_the_features_name_is_learnt_by_the_control_too() -> None:
    rows = one_head(heads(), 2)
    rng = np.random.default_rng(3)
    words = np.unique(rows["word"].values.astype(str), return_inverse=True)[1]
    wide = rng.normal(size=(LAYERS, ROWS, 12)).astype(np.float32)
    wide[0, np.arange(ROWS), words] += 9
    relation = np.tile(np.arange(4), SETS)
    wide[1, np.arange(ROWS), relation] += 9
    named = xr.Dataset({"resid": (("layer", "sample", "d_model"), wide)}, rows.drop_dims("d_head").coords)
    probe = linear_probe(named, target="relation", control="word", repetitions=10)
    np.testing.assert_allclose(probe["selectivity"], probe["accuracy"] - probe["control_accuracy"])
    assert probe["control_accuracy"].values[0] > 0.95
    assert probe["selectivity"].values[0] < -0.5
    assert probe["selectivity"].values[1] > 0.4
    assert (probe["control_accuracy_low"] <= probe["control_accuracy"]).all()
    assert probe.attrs["control"] == "word"


def test_control__labels_are_fixed_for_each_word_and_drawn_as_often_as_they_occur() -> None:
    rows = one_head(heads(), 2)
    laid = probe_design(rows, "relation", folds=5, repetitions=200, seed=0, control="word")
    control = laid.codes[:, 201:, 0]
    assert control.shape == (ROWS, 200)
    words = rows["word"].values.astype(str)
    for word in np.unique(words):
        assert (control[words == word] == control[words == word][0]).all()
    np.testing.assert_allclose(np.bincount(control.ravel()) / control.size, 0.25, atol=0.05)


def test_control__errors() -> None:
    with pytest.raises(DataError, match="no value of 'group' is in two folds"):
        linear_probe(heads(), target="relation", control="group")
    with pytest.raises(DimensionError, match="no label 'shape'"):
        linear_probe(heads(), target="relation", control="shape")
    run = synthetic_run(sets=30)
    probe = linear_probe(run, target="kind", tokens="text", control="token_text", repetitions=2, layer=0)
    assert probe["selectivity"].dims == ("layer",)
