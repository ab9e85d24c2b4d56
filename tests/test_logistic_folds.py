"""Multinomial logistic probes: scikit-learn's coefficients and predictions, whole or streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from mechanistic.analysis import linear_probe
from mechanistic.analysis.penalty_choice import fold_pairs
from mechanistic.analysis.probe_design import ProbeDesign, probe_design

ROWS = 120


def labelled(seed: int = 0, strength: float = 1.0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    relation = np.tile(np.arange(3), ROWS // 3)
    features = rng.normal(size=(2, ROWS, 7)) * np.exp(rng.normal(size=7)) + 4
    features[1] += strength * rng.normal(size=(3, 7))[relation]
    return xr.Dataset(
        {"resid": (("layer", "sample", "d_model"), features.astype(np.float32))},
        {
            "layer": [0, 1],
            "relation": ("sample", np.array(["left", "on", "right"], object)[relation]),
            "group": ("sample", (np.arange(ROWS) // 3).astype(str).astype(object)),
        },
    )


def design(rows: xr.Dataset, repetitions: int = 1) -> ProbeDesign:
    return probe_design(rows, "relation", folds=5, repetitions=repetitions, seed=0)


def peer(features: Any, codes: Any, penalty: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (penalty * len(codes)), tol=1e-8, max_iter=5000)
    return scaler, model.fit(scaler.transform(features).astype(np.float64), codes)


def test_logistic__equals_scikit_learn() -> None:
    rows, penalty = labelled(), 0.02
    probe = linear_probe(rows, target="relation", method="logistic", penalties=(penalty,), repetitions=1)
    laid, hits = design(rows), np.zeros((2, ROWS, 2), bool)
    for layer, features in enumerate(rows["resid"].values.astype(np.float64)):
        scaler, model = peer(features, laid.codes[:, 0, 0], penalty)
        expected = model.coef_ / scaler.scale_
        np.testing.assert_allclose(probe["coefficient"][layer], expected, atol=2e-4)
        intercept = model.intercept_ - expected @ scaler.mean_
        ours = probe["intercept"][layer].values
        np.testing.assert_allclose(ours - ours.mean(), intercept - intercept.mean(), atol=2e-3)
        for number in range(5):
            train = laid.fold != number
            for labelling in range(2):
                codes = laid.codes[:, labelling, 0]
                scaler, model = peer(features[train], codes[train], penalty)
                predicted = model.predict(scaler.transform(features[~train]))
                hits[layer, ~train, labelling] = predicted == codes[~train]
    np.testing.assert_allclose(probe["accuracy"], hits[..., 0].mean(1), atol=1e-12)
    np.testing.assert_allclose(probe["shuffled_accuracy"], hits[..., 1].mean(1), atol=1e-12)
    assert probe.attrs["method"] == "logistic"


def test_logistic__chooses_the_penalty_by_cross_entropy_of_folds_it_did_not_see() -> None:
    rows, penalties = labelled(strength=0.6), (0.001, 0.03, 1.0)
    probe = linear_probe(rows, target="relation", method="logistic", penalties=penalties, repetitions=1)
    laid = design(rows)
    codes = laid.codes[:, 0, 0]
    for layer, features in enumerate(rows["resid"].values.astype(np.float64)):
        losses = np.zeros(len(penalties))
        for pair in fold_pairs(5):
            train = ~np.isin(laid.fold, pair)
            for place, penalty in enumerate(penalties):
                scaler, model = peer(features[train], codes[train], penalty)
                for fold in pair:
                    test = laid.fold == fold
                    shares = model.predict_proba(scaler.transform(features[test]))
                    losses[place] += log_loss(codes[test], shares, normalize=False, labels=[0, 1, 2])
        assert float(probe["penalty"][layer]) == penalties[losses.argmin()]


def test_logistic__by_hand_balanced_labels_without_information() -> None:
    """The features are the same for both classes: all weights are 0 and the intercepts equal."""
    features = np.tile(np.repeat([[1.0, 0.0], [0.0, 1.0]], 2, axis=0), (20, 1))[None].astype(np.float32)
    rows = xr.Dataset(
        {"resid": (("layer", "sample", "d_model"), features)},
        {"layer": [0], "side": ("sample", np.tile(np.array(["a", "b"], object), 40))},
    )
    rows = rows.assign_coords(group=("sample", (np.arange(80) // 4).astype(str).astype(object)))
    probe = linear_probe(rows, target="side", method="logistic", repetitions=1)
    np.testing.assert_allclose(probe["coefficient"], 0, atol=1e-5)
    np.testing.assert_allclose(probe["intercept"][0, 0], probe["intercept"][0, 1], atol=1e-5)


def test_logistic__streamed_lazy_equals_eager() -> None:
    rows = labelled()
    options: dict[str, Any] = {"target": "relation", "method": "logistic", "repetitions": 1}
    whole = linear_probe(rows, **options)
    lazy = linear_probe(rows.chunk(layer=1, sample=50), max_bytes=7 * 4 * 60, **options)
    assert lazy["accuracy"].chunks is not None
    np.testing.assert_allclose(lazy["coefficient"], whole["coefficient"], atol=2e-4)
    np.testing.assert_array_equal(lazy["prediction"], whole["prediction"])


def test_logistic__heads_and_several_targets() -> None:
    rows = labelled()
    rows = rows.assign_coords(half=("sample", np.tile([0, 1, 1], ROWS // 3)))
    rows = rows.assign(resid=rows["resid"].expand_dims(head=[0, 1], axis=2))
    probe = linear_probe(
        rows, target=["relation", "half"], method="logistic", repetitions=1, penalties=(0.1,)
    )
    assert probe["accuracy"].dims == ("layer", "head", "target")
    np.testing.assert_array_equal(probe["accuracy"].sel(head=0), probe["accuracy"].sel(head=1))
    alone = linear_probe(
        rows.sel(head=0, drop=True), target="half", method="logistic", repetitions=1, penalties=(0.1,)
    )
    own = probe["coefficient"].sel(head=0).values[:, probe["class_target"].values == "half"]
    np.testing.assert_allclose(own, alone["coefficient"], atol=1e-4)


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_logistic__finds_what_ridge_finds(method: Any) -> None:
    probe = linear_probe(labelled(strength=4.0), target="relation", method=method, repetitions=3)
    assert probe["accuracy"].values[1] > 0.9
    assert probe["accuracy"].values[0] < 0.5
