"""Stored attention rows come out of the same call as rebuilt ones."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from tiny_models import Listed, llava, samples

from mechanistic.analysis import attention_entropy, attention_pattern
from mechanistic.capture.job import capture_run
from mechanistic.store import open_run
from mechanistic.store.errors import SpecificationError


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.DataTree, xr.DataTree]:
    """The same samples captured as patterns, and as q and k."""
    folder: Path = tmp_path_factory.mktemp("stored")
    loaded, dataset = llava(), Listed(samples(4, images=(1, 2)))
    settings = {"batch_size": 2, "max_new_tokens": 2, "quiet": True}
    capture_run(loaded, dataset, folder / "a", sites=["text.*.pattern[text]", "vision.1.pattern"], **settings)
    sites = ["text.*.q[text]", "text.*.k", "vision.1.q", "vision.1.k"]
    capture_run(loaded, dataset, folder / "b", sites=sites, **settings)
    return open_run(folder / "a"), open_run(folder / "b")


@pytest.mark.parametrize("stack", ["text", "vision"])
@pytest.mark.parametrize("sample", [0, 3])
def test_stored_pattern__equals_the_rebuilt_one(
    both: tuple[xr.DataTree, xr.DataTree], stack: str, sample: int
) -> None:
    stored, rebuilt = (attention_pattern(run, sample=sample, stack=stack) for run in both)
    assert isinstance(stored["attention_pattern"].data, da.Array)
    assert stored["attention_pattern"].dims == rebuilt["attention_pattern"].dims
    np.testing.assert_allclose(stored["attention_pattern"], rebuilt["attention_pattern"], atol=1e-6)
    for name in ("query_position", "key_position", "key_kind", "key_patch_row", "layer", "head"):
        np.testing.assert_array_equal(stored[name], rebuilt[name])
    assert set(stored.coords) == set(rebuilt.coords)


def test_stored_pattern__selects_rows_layers_and_heads(both: tuple[xr.DataTree, xr.DataTree]) -> None:
    stored, rebuilt = (attention_pattern(run, sample=1, layer=2, head=1, query="last") for run in both)
    assert stored["attention_pattern"].dims == ("query", "key")
    np.testing.assert_allclose(stored["attention_pattern"], rebuilt["attention_pattern"], atol=1e-6)
    entropies = [attention_entropy(pattern.compute())["attention_entropy"] for pattern in (stored, rebuilt)]
    np.testing.assert_allclose(entropies[0], entropies[1], atol=1e-5)
    with pytest.raises(SpecificationError, match="no head 99"):
        attention_pattern(both[0], sample=1, head=99)
