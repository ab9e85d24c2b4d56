"""Noise ceilings: by definition, as rsatoolbox has them, layer by layer."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dissimilarities import METHODS, pairs, random_matrices, rdms

from mechanistic.analysis.noise_ceiling import noise_ceiling
from mechanistic.store.errors import DataError, DimensionError


def test_noise_ceiling__by_definition() -> None:
    values = random_matrices(4)
    bounds = noise_ceiling(rdms(values, "seed"), over="seed", method="correlation")
    z = np.stack([(pairs(v) - pairs(v).mean()) / pairs(v).std() for v in values])
    high = [np.corrcoef(z.mean(axis=0), own)[0, 1] for own in z]
    low = [np.corrcoef(np.delete(z, k, axis=0).mean(axis=0), own)[0, 1] for k, own in enumerate(z)]
    assert float(bounds["ceiling_high"]) == pytest.approx(np.mean(high))
    assert float(bounds["ceiling_low"]) == pytest.approx(np.mean(low))
    same = noise_ceiling(rdms(np.stack([values[0]] * 3), "seed"), over="seed")
    assert (float(same["ceiling_low"]), float(same["ceiling_high"])) == pytest.approx((1, 1))


def test_noise_ceiling__of_each_head() -> None:
    values = random_matrices(12).reshape(3, 2, 2, *random_matrices(1).shape[1:])
    heads = xr.Dataset({"dissimilarity": (("seed", "layer", "head", "condition", "other"), values)})
    bounds = noise_ceiling(heads["dissimilarity"], over="seed")["ceiling_low"]
    assert bounds.dims == ("layer", "head")
    one = noise_ceiling(rdms(values[:, 1, 0], "seed"), over="seed")["ceiling_low"]
    assert float(bounds[1, 0]) == float(one)


# The reference warns of itself.
@pytest.mark.filterwarnings("ignore:Noise ceiling for tau based on averaged ranks:UserWarning")
def test_noise_ceiling__equals_rsatoolbox() -> None:
    import rsatoolbox

    values = random_matrices(3, seed=1)
    names = {"spearman": "spearman", "kendall": "tau-a", "cosine": "cosine", "correlation": "corr"}
    for method, name in names.items():
        low, high = rsatoolbox.inference.boot_noise_ceiling(rsatoolbox.rdm.RDMs(values), method=name)
        bounds = noise_ceiling(rdms(values, "seed"), over="seed", method=method)  # type: ignore[arg-type]
        assert (float(bounds["ceiling_low"]), float(bounds["ceiling_high"])) == pytest.approx((low, high))


def test_noise_ceiling__is_lazy_and_layer_by_layer() -> None:
    values = random_matrices(6).reshape(3, 2, 8, 8)
    data = xr.Dataset({"dissimilarity": (("seed", "layer", "condition", "other"), values)})
    for method in METHODS:
        eager = noise_ceiling(data, over="seed", method=method)
        lazy = noise_ceiling(data.chunk(seed=1, condition=3), over="seed", method=method)
        assert isinstance(lazy["ceiling_low"].data, da.Array)
        assert eager["ceiling_low"].dims == ("layer",)
        xr.testing.assert_allclose(lazy.compute(), eager)
        assert (eager["ceiling_low"] <= eager["ceiling_high"]).all()


@pytest.mark.parametrize(
    ("values", "over", "error", "text"),
    [
        (random_matrices(1), "seed", DataError, "there is one seed only"),
        (
            random_matrices(2),
            "run",
            DimensionError,
            r"a noise ceiling needs dissimilarity \(run, condition, other\)",
        ),
    ],
)
def test_noise_ceiling__refuses(values: Any, over: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        noise_ceiling(rdms(values, "seed"), over=over)
