"""Probes of every layer: CPU seconds of a scikit-learn loop and of this library, side by side.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_probe.py

The rows are 4,000 samples in minimal-pair sets of four, 1,024 features whose spectrum falls as 1 / rank, as
residual streams do, and a relation in a direction of middling variance. The peer is what a user would write:
StandardScaler and LogisticRegression in cross_val_score with GroupKFold, layer by layer. It runs once at C =
1, and once with C chosen by a grid search inside each training split, which is what linear_probe always does.
Accuracies are compared: ours must be no more than a point below. The last lines have no target: more output
of ours, and white features, on which the peer converges fastest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.analysis.linear_probe import linear_probe

ROWS, FEATURES, LAYERS, RUNS = 4000, 1024, 8, 2
TARGET = 10


def main() -> int:
    """Print times, ratios and accuracies; 1 when a target is missed, 2 when the peer is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        print("error: this benchmark needs its peer.\n  pip install scikit-learn", file=sys.stderr)
        return 2
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"{LAYERS} layers of {ROWS} x {FEATURES}; CPU seconds a layer, OMP_NUM_THREADS {threads}")
    rows = spectrum_rows(1.0)
    fixed, nested = timed(lambda: peer(rows)), timed(lambda: peer(rows, search=True), runs=1)
    single = timed(lambda: linear_probe(rows, target="relation", penalties=(0.1,), repetitions=1))
    plain = timed(lambda: linear_probe(rows, target="relation", repetitions=1))
    whole = timed(lambda: linear_probe(rows, target="relation"))
    ratios = [
        report("fixed penalty, no controls", fixed, single),
        report("penalty chosen inside, no controls", nested, plain),
    ]
    report("(C = 1; ours with penalty chosen)", fixed, plain)
    report("(C = 1; ours with 20 shuffled copies)", fixed, whole)
    white = spectrum_rows(0.0)
    other = timed(lambda: linear_probe(white, target="relation", penalties=(1.0,), repetitions=1))
    report("(white features, fixed penalty)", timed(lambda: peer(white)), other)
    missed = [ratio for ratio in ratios if ratio < TARGET]
    print(f"target: {TARGET}x within a point; {'met' if not missed else f'missed by {len(missed)}'}")
    return int(bool(missed))


def spectrum_rows(exponent: float) -> xr.Dataset:
    rng = np.random.default_rng(0)
    spread = np.arange(1, FEATURES + 1) ** (-exponent / 2)
    basis, _ = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))
    relation = np.tile(np.arange(4), ROWS // 4)
    means = np.zeros((4, FEATURES))
    means[:, 40:200] = 0.2 * rng.normal(size=(4, 160)) * spread[40:200]
    layers = [
        ((rng.normal(size=(ROWS, FEATURES)) * spread + means[relation]) @ basis.T).astype(np.float32)
        for _ in range(LAYERS)
    ]
    names = np.array(["left", "right", "above", "below"], object)
    return xr.Dataset(
        {"resid_post": (("layer", "sample", "d_model"), np.stack(layers))},
        {
            "layer": np.arange(LAYERS),
            "relation": ("sample", names[relation]),
            "group": ("sample", (np.arange(ROWS) // 4).astype(str).astype(object)),
        },
    )


def peer(rows: xr.Dataset, search: bool = False) -> float:
    """Mean accuracy of the usual loop over layers."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    labels, groups = rows["relation"].values.astype(str), rows["group"].values
    scores = []
    for features in rows["resid_post"].values:
        if not search:
            scores.append(cross_val_score(model, features, labels, groups=groups, cv=GroupKFold(5)).mean())
            continue
        grid = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1]}
        for train, test in GroupKFold(5).split(features, labels, groups):
            found = GridSearchCV(model, grid, cv=GroupKFold(2))
            found.fit(features[train], labels[train], groups=groups[train])
            scores.append(found.score(features[test], labels[test]))
    return float(np.mean(scores))


def timed(call: Callable[[], Any], runs: int = RUNS) -> tuple[float, float]:
    """The least CPU seconds a layer, and the mean accuracy."""
    best, result = np.inf, None
    for _ in range(runs):
        begun = time.process_time()
        result = call()
        best = min(best, time.process_time() - begun)
    accuracy = float(result["accuracy"].mean()) if isinstance(result, xr.Dataset) else float(result or 0)
    return best / LAYERS, accuracy


def report(name: str, theirs: tuple[float, float], ours: tuple[float, float]) -> float:
    """Print a line; the ratio counts as 0 where the accuracy is more than a point below."""
    ratio = theirs[0] / ours[0]
    print(
        f"  {name:38} scikit-learn {theirs[0]:7.2f} ({theirs[1]:.3f})   "
        f"mechanistic {ours[0]:6.3f} ({ours[1]:.3f})   ratio {ratio:6.1f}"
    )
    return ratio if ours[1] > theirs[1] - 0.01 else 0.0


if __name__ == "__main__":
    sys.exit(main())
