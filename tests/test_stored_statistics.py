"""Numbers of attention rows that a run stored when it was captured."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import without_groups
from tiny_models import Listed, llava, samples

from mechanistic.analysis import (
    attention_concentration,
    attention_distance,
    attention_entropy,
    attention_mass,
    attention_statistics,
    summarize,
    with_samples,
)
from mechanistic.analysis.attention_entropy import entropy_statistic
from mechanistic.analysis.attention_mass import mass_statistic
from mechanistic.capture.job import capture_run
from mechanistic.store import open_run, site
from mechanistic.store.errors import MissingSiteError, SpecificationError


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """A run with q, k and attn_stats of the text rows."""
    path: Path = tmp_path_factory.mktemp("stats") / "run"
    sites = ["text.*.q[text]", "text.*.k[all]", "text.*.attn_stats[text]"]
    capture_run(llava(), Listed(samples(6)), path, sites=sites, max_new_tokens=1, quiet=True)
    return open_run(path)


@pytest.fixture(scope="module")
def stored(both: xr.DataTree) -> xr.DataTree:
    return without_groups(both, "text/q")


@pytest.mark.parametrize("measure", [attention_entropy, attention_concentration, attention_mass])
def test_stored_statistics__are_those_from_q_and_k(
    both: xr.DataTree, stored: xr.DataTree, measure: object
) -> None:
    assert callable(measure)
    found, expected = measure(stored), measure(both)
    assert found.attrs == {**expected.attrs, "computed_from": "attn_stats"}
    for name, values in expected.data_vars.items():
        assert isinstance(found[name].data, da.Array)
        assert found[name].dims == values.dims
        np.testing.assert_allclose(found[name].values, values.values, atol=1e-5)
        np.testing.assert_array_equal(found[name].values, site(both, "text/attn_stats")[name].values)
    assert set(found.coords) == set(expected.coords)


def test_stored_statistics__rows_are_chosen_alike(both: xr.DataTree, stored: xr.DataTree) -> None:
    asked = {"tokens": "last+subject", "layer": [2, 0], "sample": [4, 1]}
    found, expected = (attention_entropy(run, **asked).compute() for run in (stored, both))
    xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs(), atol=1e-5)
    several = attention_statistics(stored, [entropy_statistic(), mass_statistic()], tokens="last")
    table = summarize(with_samples(several, stored, ["relation"]), by=["relation"]).compute()
    assert table["mass_image"].sizes["layer"] == 3


def test_stored_statistics__what_was_not_stored_is_named(stored: xr.DataTree) -> None:
    with pytest.raises(MissingSiteError, match=r"no attention_concentration \(k=3\); it has .*\(k=5\)"):
        attention_concentration(stored, k=3)
    with pytest.raises(MissingSiteError, match=r"no normalized_entropy; it has .*attention_entropy"):
        attention_entropy(stored, normalize=True)
    with pytest.raises(MissingSiteError, match=r"no attention_distance.*\n  Capture the attention itself"):
        attention_distance(stored)
    with pytest.raises(SpecificationError, match="There is no layer 9"):
        attention_entropy(stored, layer=9)
    with pytest.raises(MissingSiteError, match="text/q"):
        attention_entropy(without_groups(stored, "text/attn_stats"))
