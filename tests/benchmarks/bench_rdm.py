"""Dissimilarity matrices of 2,000 conditions: CPU seconds of rsatoolbox and of this library, side by side.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_rdm.py

Each time is the least of five runs of the public call, from arrays in memory to the finished matrix; the
results are compared. rsatoolbox runs as its documentation says: `calc_rdm` with descriptors, for crossnobis
with the noise precision from `prec_from_unbalanced`. The line in brackets has no target: crossnobis without
noise, at this size one matrix product for either side.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.analysis.rdm import representational_dissimilarity

CONDITIONS, PARTITIONS, FEATURES, RUNS = 2000, 2, 1024, 5
TARGET = 10


def main() -> int:
    """Print the times and ratios; 1 when a target is missed, 2 when the peer is missing."""
    try:
        import rsatoolbox
    except ImportError:
        print(
            "error: this benchmark needs its peer, rsatoolbox.\n  pip install rsatoolbox==0.3.2",
            file=sys.stderr,
        )
        return 2
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(
        f"{CONDITIONS} conditions x {FEATURES} features, {PARTITIONS} partitions; CPU seconds, "
        f"OMP_NUM_THREADS={threads}"
    )
    ratios = [*correlation(rsatoolbox), *crossnobis(rsatoolbox)]
    missed = [ratio for ratio in ratios if ratio < TARGET]
    print(f"target: {TARGET}x; {'met' if not missed else f'missed by {len(missed)}'}")
    return int(bool(missed))


def correlation(rsatoolbox: Any) -> list[float]:
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(CONDITIONS, FEATURES)).astype(np.float32)
    peer_data = rsatoolbox.data.Dataset(patterns, obs_descriptors={"condition": np.arange(CONDITIONS)})
    rows = xr.DataArray(patterns[None], dims=("layer", "row", "feature"))
    theirs, expected = timed(lambda: rsatoolbox.rdm.calc_rdm(peer_data, method="correlation"))
    grouped, _ = timed(
        lambda: rsatoolbox.rdm.calc_rdm(peer_data, method="correlation", descriptor="condition")
    )
    ours, result = timed(lambda: representational_dissimilarity(rows, metric="correlation"))
    check(result, expected)
    return [
        report("correlation", theirs, ours),
        report("correlation, conditions named", grouped, ours),
    ]


def crossnobis(rsatoolbox: Any) -> list[float]:
    rng = np.random.default_rng(1)
    means = rng.normal(size=(CONDITIONS, 1, FEATURES))
    rows = (
        (means + rng.normal(size=(CONDITIONS, PARTITIONS, FEATURES))).reshape(-1, FEATURES).astype(np.float32)
    )
    condition = np.repeat(np.arange(CONDITIONS), PARTITIONS)
    partition = np.tile(np.arange(PARTITIONS), CONDITIONS)
    peer_data = rsatoolbox.data.Dataset(
        rows, obs_descriptors={"condition": condition, "partition": partition}
    )
    labelled = xr.DataArray(
        rows[None],
        dims=("layer", "row", "feature"),
        coords={"condition_number": ("row", condition), "partition": ("row", partition)},
    )
    names = {"method": "crossnobis", "descriptor": "condition", "cv_descriptor": "partition"}

    def peer() -> Any:
        precision = rsatoolbox.data.noise.prec_from_unbalanced(peer_data, "condition", method="shrinkage_eye")
        return rsatoolbox.rdm.calc_rdm(peer_data, noise=precision, **names)

    def own(covariance: Any) -> xr.Dataset:
        return representational_dissimilarity(
            labelled,
            metric="crossnobis",
            conditions="condition_number",
            partitions="partition",
            covariance=covariance,
        )

    theirs, expected = timed(peer, runs=1)
    ours, result = timed(lambda: own("within"))
    check(result, expected)
    plain, expected = timed(lambda: rsatoolbox.rdm.calc_rdm(peer_data, **names))
    without, result = timed(lambda: own("identity"))
    check(result, expected)
    ratio = report("crossnobis", theirs, ours)
    report("(crossnobis without noise)", plain, without)
    return [ratio]


def timed(call: Callable[[], Any], runs: int = RUNS) -> tuple[float, Any]:
    best, result = np.inf, None
    for _ in range(runs):
        begun = time.process_time()
        result = call()
        best = min(best, time.process_time() - begun)
    return best, result


def check(ours: xr.Dataset, theirs: Any) -> None:
    np.testing.assert_allclose(
        ours["dissimilarity"].values[0], theirs.get_matrices()[0], rtol=2e-4, atol=2e-4
    )


def report(name: str, theirs: float, ours: float) -> float:
    print(f"  {name:36} rsatoolbox {theirs:8.2f}   mechanistic {ours:6.3f}   ratio {theirs / ours:6.1f}")
    return theirs / ours


if __name__ == "__main__":
    sys.exit(main())
