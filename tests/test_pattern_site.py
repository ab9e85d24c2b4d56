"""Materialised attention rows: ragged, end to end, found by start and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from tiny_models import Listed, llava, samples

import mechanistic.capture.backend as backend
from mechanistic.analysis import attention_pattern
from mechanistic.capture.job import capture_run, price_run
from mechanistic.capture.models import LoadedModel
from mechanistic.store import open_run, site
from mechanistic.store.verify import verify_run

SITES = (
    "text.*.pattern[last+subject]",
    "text.*.q",
    "text.*.k",
    "vision.1.pattern",
    "vision.*.q",
    "vision.*.k",
)
SETTINGS: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 2, "quiet": True}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def dataset() -> Listed:
    return Listed(samples(5, images=(1, 2)))


@pytest.fixture(scope="module")
def run(loaded: LoadedModel, dataset: Listed, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    path = tmp_path_factory.mktemp("pattern") / "run"
    capture_run(loaded, dataset, path, sites=SITES, **SETTINGS)
    assert verify_run(path) == []
    return open_run(path)


def row(run: xr.DataTree, stack: str, number: int) -> NDArray[Any]:
    """One stored row, (layer, key, head), over all keys of its sample."""
    rows, weights = site(run, f"{stack}/pattern_rows"), site(run, f"{stack}/pattern")["pattern"]
    start, length, first = (int(rows[name][number]) for name in ("start", "length", "key_start"))
    tokens = run[f"tokens/{stack}"].to_dataset()
    keys = int((tokens["sample_index"].values == int(rows["sample_index"][number])).sum())
    whole = np.zeros((weights.sizes["layer"], keys, weights.sizes["head"]), np.float32)
    whole[:, first : first + length] = weights.isel(entry=slice(start, start + length)).values
    return whole


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_pattern__rows_are_those_rebuilt_from_q_and_k(run: xr.DataTree, stack: str) -> None:
    rows = site(run, f"{stack}/pattern_rows")
    layers = site(run, f"{stack}/pattern")["layer"].values
    assert layers.tolist() == ([0, 1, 2] if stack == "text" else [1])
    rebuilt = {
        number: attention_pattern(run, sample=number, layer=layers.tolist(), stack=stack)[
            "attention_pattern"
        ].transpose("layer", "query", "key", "head")
        for number in range(5)
    }
    for number in range(0, len(rows["start"]), 1 if stack == "text" else 40):
        expected = rebuilt[int(rows["sample_index"][number])]
        place = np.flatnonzero(expected["query_position"].values == int(rows["position"][number]))
        np.testing.assert_allclose(row(run, stack, number), expected.values[:, place[0]], rtol=0, atol=1e-6)


def test_pattern__has_the_rows_that_were_asked_for_and_nothing_between(run: xr.DataTree) -> None:
    rows, weights = site(run, "text/pattern_rows"), site(run, "text/pattern")
    assert (rows["is_last_prompt"] | rows["is_subject"]).values.all()
    tokens = run["tokens/text"].to_dataset()
    assert rows.sizes["token"] == int((tokens["is_last_prompt"] | tokens["is_subject"]).sum())
    np.testing.assert_array_equal(
        rows["start"].values, np.concatenate([[0], np.cumsum(rows["length"].values)[:-1]])
    )
    assert weights.sizes["entry"] == int(rows["length"].sum())
    assert weights.attrs["tokens"] == "subject+last"
    assert weights.attrs["attention"]["0"]["mask"] == "causal"
    np.testing.assert_allclose(
        np.add.reduceat(weights["pattern"].values, rows["start"].values, axis=1), 1, rtol=0, atol=1e-5
    )


def test_pattern__is_priced_exactly_for_prompts_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    same, spec = Listed(samples(1)), ["text.*.pattern[text]:float16"]
    cost = price_run(loaded, same, tmp_path / "run", sites=spec, max_new_tokens=0)
    capture_run(loaded, same, tmp_path / "run", sites=spec, **{**SETTINGS, "max_new_tokens": 0})
    held = site(open_run(tmp_path / "run"), "text/pattern")["pattern"]
    assert held.dtype == np.float16
    assert cost.sites[0].raw - 12 * cost.sites[0].rows == held.nbytes


class Killed(BaseException):
    """What a kill at this place would do."""


def test_pattern__starts_go_on_after_a_kill(
    loaded: LoadedModel, dataset: Listed, run: xr.DataTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = backend.capture_forward, []

    def die(*arguments: Any) -> Any:
        seen.append(None)
        if len(seen) == 3:
            raise Killed
        return forward(*arguments)

    monkeypatch.setattr(backend, "capture_forward", die)
    with pytest.raises(Killed):
        capture_run(loaded, dataset, tmp_path / "run", sites=SITES, **SETTINGS)
    capture_run(loaded, dataset, tmp_path / "run", sites=SITES, **SETTINGS)
    again = open_run(tmp_path / "run")
    for group in ("text/pattern", "text/pattern_rows", "vision/pattern", "vision/pattern_rows"):
        xr.testing.assert_identical(site(again, group).drop_attrs(), site(run, group).drop_attrs())
