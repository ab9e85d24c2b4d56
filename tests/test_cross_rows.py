"""Rows of cross-attention, computed while the model runs, against the same from stored xq and xk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from run_groups import without_groups
from tiny_models import Listed
from zoo import ZOO, Family, samples

from mechanistic.analysis import attention_concentration, attention_entropy, attention_mass, attention_pattern
from mechanistic.capture.job import capture_run
from mechanistic.store import open_run, site
from mechanistic.store.errors import MissingSiteError, SpecificationError
from mechanistic.store.verify import verify_run

CROSSING = {name: family for name, family in ZOO.items() if family.cross}
MEASURES: tuple[Callable[..., xr.Dataset], ...] = (
    attention_entropy,
    attention_concentration,
    attention_mass,
)


def captured(family: Family, path: Path, sites: list[str]) -> xr.DataTree:
    loaded = family.build()
    answer = {"batch_size": 3, "max_new_tokens": 2 if loaded.model.can_generate() else 0, "quiet": True}
    capture_run(loaded, Listed(samples(family)), path, sites=sites, **answer)
    assert verify_run(path) == []
    return open_run(path)


@pytest.fixture(scope="module", params=CROSSING)
def crossing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, xr.DataTree]:
    family = CROSSING[request.param]
    names = ("xq", "xk", "xattn_stats", "xpattern")
    sites = [f"{stack}.*.{name}" for stack in family.cross for name in names]
    return family, captured(family, tmp_path_factory.mktemp(request.param) / "run", sites)


def test_xattn_stats__equal_what_analysis_computes_from_xq_and_xk(
    crossing: tuple[Family, xr.DataTree],
) -> None:
    family, run = crossing
    for stack, layers in family.cross.items():
        stored = site(run, f"{stack}/xattn_stats")
        assert stored["layer"].values.tolist() == list(layers)
        expected: dict[str, Any] = {}
        for measure in MEASURES:
            found = measure(run, stack=stack, cross=True)
            assert found.attrs["computed_from"] == "xq and xk"
            expected |= dict(found.data_vars)
        for name, values in expected.items():
            np.testing.assert_allclose(stored[name].values, values.values, rtol=0, atol=1e-5)
        # All keys are the image's: patches, or class tokens and padding.
        assert float(stored["mass_image"].min()) > 0
        total = stored["mass_image"] + stored["mass_special"]
        np.testing.assert_allclose(total.values, 1, rtol=0, atol=1e-5)


def test_xattn_stats__name_the_strongest_keys(crossing: tuple[Family, xr.DataTree]) -> None:
    family, run = crossing
    for stack in family.cross:
        stored = site(run, f"{stack}/xattn_stats")
        for number in range(4):
            mine = stored.isel(token=np.flatnonzero(stored["sample_index"].values == number))
            pattern = attention_pattern(run, sample=number, stack=stack, cross=True)["attention_pattern"]
            weights = pattern.transpose("layer", "query", "head", "key").values
            top = mine["top_position"].values
            assert (top >= 0).all()
            chosen = np.take_along_axis(weights, top, axis=-1)
            np.testing.assert_allclose(chosen, -np.sort(-weights, axis=-1)[..., :5], rtol=0, atol=1e-6)
            np.testing.assert_allclose(mine["attention_max"].values, weights.max(-1), rtol=0, atol=1e-6)


def test_cross_rows__are_read_where_xq_and_xk_are_not_kept(crossing: tuple[Family, xr.DataTree]) -> None:
    family, run = crossing
    for stack in family.cross:
        rows = without_groups(without_groups(run, f"{stack}/xq"), f"{stack}/xk")
        for measure in MEASURES:
            stored, rebuilt = (measure(each, stack=stack, cross=True) for each in (rows, run))
            assert stored.attrs == {**rebuilt.attrs, "computed_from": "xattn_stats"}
            xr.testing.assert_allclose(stored.drop_attrs(), rebuilt.drop_attrs(), atol=1e-5)
        with pytest.raises(MissingSiteError, match=r"xattn_stats has no .*k=3.*no xq and xk here.*\n.*\.xk"):
            attention_concentration(rows, k=3, stack=stack, cross=True)
        for number in range(4):
            stored, rebuilt = (
                attention_pattern(each, sample=number, stack=stack, cross=True) for each in (rows, run)
            )
            xr.testing.assert_allclose(stored.drop_attrs(), rebuilt.drop_attrs(), atol=1e-6)


def test_cross_rows__keep_selected_rows_layers_and_heads(tmp_path: Path) -> None:
    sites = [
        "text.1.xattn_stats{1}[last+subject]",
        "text.1.xpattern{1}[last]:float16",
        "text.1.xq",
        "text.1.xk",
    ]
    run = captured(CROSSING["blip"], tmp_path / "run", sites)
    few = site(run, "text/xattn_stats")
    assert (few["is_last_prompt"] | few["is_subject"]).values.all()
    whole = attention_entropy(run, cross=True, tokens="last+subject").sel(layer=[1], head=[1])
    np.testing.assert_allclose(few["attention_entropy"], whole["attention_entropy"], rtol=0, atol=1e-5)
    rows, weights = site(run, "text/xpattern_rows"), site(run, "text/xpattern")
    assert (rows.sizes["token"], weights["xpattern"].dtype) == (4, np.float16)
    assert weights.sizes["entry"] == int(rows["length"].sum()) == site(run, "text/xk").sizes["patch"]


def test_cross_rows__are_refused_where_nothing_crosses_over(tmp_path: Path) -> None:
    for name in ("xattn_stats", "xpattern"):
        with pytest.raises(SpecificationError, match="no layer of text has cross-attention"):
            captured(ZOO["llava"], tmp_path / "run", [f"text.*.{name}"])
