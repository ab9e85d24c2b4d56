"""A sample that failed and was tried again counts once: its first row is in no analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiny_models import Listed, llava, picture, samples

from mechanistic.analysis import (
    accuracy,
    attention_entropy,
    attention_mass,
    head_importance,
    hub_tokens,
    logit_attribution,
    logit_lens,
    rollout_row,
    summarize,
    two_hop,
    with_samples,
)
from mechanistic.capture.job import capture_run
from mechanistic.store import group, open_run

SITES = ["text.*.q", "text.*.k", "text.*.z[last]", "text.*.attn_out[last]", "text.*.resid_post[last]"]
COUNT = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.DataTree, xr.DataTree]:
    """A run two of whose samples failed and were tried again, and one of the same samples in that order."""
    folder: Path = tmp_path_factory.mktemp("retried")
    loaded, good = llava(), samples(COUNT)
    images = [folder / "0.png", folder / "3.png"]
    asked = list(good)
    for image, place in zip(images, (0, 3), strict=True):
        asked[place] = replace(good[place], images=(image,))
    settings = {"sites": SITES, "batch_size": 1, "max_new_tokens": 1, "quiet": True}
    assert capture_run(loaded, Listed(tuple(asked)), folder / "run", **settings).failed == 2
    for image, place in zip(images, (0, 3), strict=True):
        picture(10 * place).save(image)
    capture_run(loaded, Listed(tuple(asked)), folder / "run", retry_failed=True, **settings)
    ordered = [good[place] for place in (1, 2, 4, 5, 0, 3)]
    capture_run(loaded, Listed(tuple(ordered)), folder / "clean", **settings)
    retried, clean = open_run(folder / "run"), open_run(folder / "clean")
    assert group(retried, "samples")["status"].values.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    return retried, clean


RESULTS: dict[str, Callable[[xr.DataTree], xr.Dataset]] = {
    "attention_entropy": lambda run: attention_entropy(run, tokens="last"),
    "attention_mass": attention_mass,
    "two_hop": two_hop,
    "hub_tokens": hub_tokens,
    "rollout_row": rollout_row,
    "logit_attribution": logit_attribution,
    "logit_attribution of layers": lambda run: logit_attribution(run, of="attn_out"),
    "logit_lens": lambda run: logit_lens(run, tokens="last"),
    "head_importance": lambda run: head_importance(run, clusters=None, resamples=50),
    "accuracy": lambda run: accuracy(run),
}


@pytest.mark.parametrize("name", RESULTS)
def test_retried_samples__count_once(runs: tuple[xr.DataTree, xr.DataTree], name: str) -> None:
    retried, clean = (RESULTS[name](run).compute() for run in runs)
    assert retried.sizes == clean.sizes
    for variable, expected in clean.data_vars.items():
        if expected.dtype.kind in "fi":
            np.testing.assert_allclose(retried[variable].values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["attention_entropy", "two_hop", "logit_attribution", "logit_attribution of layers"]
)
def test_retried_samples__are_counted_once_in_a_split(
    runs: tuple[xr.DataTree, xr.DataTree], name: str
) -> None:
    tables = [
        summarize(with_samples(RESULTS[name](run), run, ["even"]), by=["even"]).compute() for run in runs
    ]
    assert tables[0]["n_sample"].values.tolist() == [3, 3]
    for variable, expected in tables[1].data_vars.items():
        np.testing.assert_allclose(tables[0][variable].values, expected.values, rtol=1e-3, atol=1e-4)
