"""Half precision: close to float32 within what is promised, stored exactly, and never cast in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from tiny_models import Listed, llava, samples

from mechanistic.capture.forward import to_host
from mechanistic.capture.job import capture_run
from mechanistic.capture.proof import TOLERANCE
from mechanistic.capture.sites import resolve_sites
from mechanistic.capture.specification import parse_sites
from mechanistic.store import open_run, site
from mechanistic.store.errors import CaptureError, SpecificationError

SITES = (
    "text.*.resid_post",
    "text.*.resid_mid",
    "text.*.attn_out",
    "text.*.q",
    "text.*.k",
    "text.*.v",
    "text.*.z",
    "text.*.attn_stats",
    "text.*.pattern[last]",
    "vision.*.resid_post",
    "vision.*.q",
)
HALVES = {"float16": "float16", "bfloat16": "float32"}
COMPUTED = ("text/attn_stats", "text/pattern", "text/pattern_rows")
# Root mean square of the difference, as a share of that of the float32 values, after three random layers.
CLOSE = {"float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    """The same prompts in three dtypes; the weights of all are those that bfloat16 holds."""
    folder, held = tmp_path_factory.mktemp("dtypes"), {}
    for dtype in ("float32", *HALVES):
        loaded = llava(dtype=torch.bfloat16)
        loaded.model.to(getattr(torch, dtype))
        capture_run(
            loaded,
            Listed(samples(3, images=(1, 2))),
            folder / dtype,
            sites=SITES,
            max_new_tokens=0,
            quiet=True,
        )
        held[dtype] = open_run(folder / dtype)
    return held


def values(run: xr.DataTree, group: str) -> NDArray[Any]:
    array: NDArray[Any] = site(run, group)[group.split("/")[1]].values
    return array


def groups() -> list[str]:
    return [spec.group for spec in parse_sites(SITES) if spec.group not in COMPUTED]


@pytest.mark.parametrize("dtype", list(HALVES))
def test_half_precision__stays_close_to_float32(runs: dict[str, xr.DataTree], dtype: str) -> None:
    for group in groups():
        exact, half = values(runs["float32"], group), values(runs[dtype], group).astype(np.float32)
        error = np.sqrt(((half - exact) ** 2).mean() / (exact**2).mean())
        assert 0 < error <= CLOSE[dtype], f"{group}: {error:.2g}"


@pytest.mark.parametrize("dtype", list(HALVES))
def test_half_precision__is_stored_exactly_and_says_what_it_was(
    runs: dict[str, xr.DataTree], dtype: str
) -> None:
    run = runs[dtype]
    assert run.attrs["model"]["dtype"] == dtype
    assert run.attrs["proven"]["tolerance"] == TOLERANCE[dtype]
    for group in groups():
        held = site(run, group)
        assert (held.attrs["source_dtype"], str(values(run, group).dtype)) == (dtype, HALVES[dtype])
        # Every stored number is one that the model's own dtype has.
        tensor = torch.from_numpy(values(run, group)).float()
        assert torch.equal(tensor.to(getattr(torch, dtype)).float(), tensor)


@pytest.mark.parametrize("dtype", list(HALVES))
def test_half_precision__attention_rows_are_computed_in_float32(
    runs: dict[str, xr.DataTree], dtype: str
) -> None:
    from mechanistic.analysis import attention_entropy

    stored = site(runs[dtype], "text/attn_stats")
    assert {str(v.dtype) for v in stored.data_vars.values()} == {"float32", "int32"}
    # Rebuilt from the stored q and k it is the same, since those are exact.
    rebuilt = attention_entropy(runs[dtype])["attention_entropy"].values
    np.testing.assert_allclose(stored["attention_entropy"].values, rebuilt, rtol=0, atol=1e-5)
    exact = site(runs["float32"], "text/attn_stats")
    np.testing.assert_allclose(
        stored["attention_entropy"].values, exact["attention_entropy"].values, rtol=0, atol=10 * CLOSE[dtype]
    )
    assert values(runs[dtype], "text/pattern").dtype == np.float32


def test_dtype_of_a_site__is_what_was_asked_for_it_alone(tmp_path: Path) -> None:
    sites = ["text.*.resid_post:float16", "text.*.q", "text.*.pattern[last]:float16"]
    settings: dict[str, Any] = {"max_new_tokens": 0, "quiet": True}
    capture_run(llava(), Listed(samples(2)), tmp_path / "run", sites=sites, **settings)
    run = open_run(tmp_path / "run")
    kept = {group: str(values(run, group).dtype) for group in ("text/resid_post", "text/q", "text/pattern")}
    assert kept == {"text/resid_post": "float16", "text/q": "float32", "text/pattern": "float16"}
    assert site(run, "text/resid_post").attrs["source_dtype"] == "float32"
    with pytest.raises(SpecificationError, match="no dtype 'bfloat16'"):
        parse_sites(["text.*.q:bfloat16"])


def test_to_host__float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    loaded = llava(dtype=torch.bfloat16)
    asked, plain = resolve_sites(parse_sites(["text.*.q:float16", "text.*.k"]), loaded.anatomy, "bfloat16")
    large = torch.full((1, 4, 8), 1e5, dtype=torch.bfloat16)
    with pytest.raises(CaptureError, match=r"text\.2\.q has values up to .*float16 cannot hold"):
        to_host(large, asked, 2)
    # What is not finite already is not made to look like an overflow of the store's own dtype.
    with pytest.raises(CaptureError, match="float16 cannot hold"):
        to_host(large * torch.nan, asked, 2)
    assert np.isnan(to_host(large * torch.nan, plain, 2)).all()
    assert to_host(large / 10, asked, 2).dtype == np.float16
    assert to_host(large, plain, 2).dtype == np.float32
    with pytest.raises(CaptureError, match=r"is torch.float32, the model bfloat16"):
        to_host(large.float(), plain, 2)


def test_capture__weights_too_large_for_float16_fail_instead_of_becoming_infinite(tmp_path: Path) -> None:
    loaded = llava()
    with torch.no_grad():
        loaded.model.model.language_model.layers[1].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(CaptureError, match="float16 cannot hold"):
        capture_run(
            loaded,
            Listed(samples(1)),
            tmp_path / "run",
            sites=["text.*.resid_post:float16"],
            max_new_tokens=0,
            quiet=True,
            fail_fast=True,
        )
