"""The certificate of two runs: the worst token is found, and nothing is compared that is not the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import xarray as xr
from synthetic_run import Plan, synthetic_run, with_groups

from mechanistic.analysis import compare_runs
from mechanistic.analysis.cli import main
from mechanistic.analysis.site_difference import row_spans
from mechanistic.store import RunWriter, open_run, read_manifest
from mechanistic.store.errors import DataError, DimensionError, MissingSiteError
from mechanistic.store.verify import verify_run

LAYERS = (3, 5, 8)


def changed(run: xr.DataTree, path: str, change: Callable[[np.ndarray], Any], name: str = "") -> xr.DataTree:
    """A run in which `change` was done to the values of one array."""
    held = run[path].to_dataset(inherit=False)
    array = held[name or path.split("/")[1]]
    values = array.values.copy()
    change(values)
    held[array.name] = (array.dims, values, array.attrs)
    return with_groups(run, **{path.replace("/", "_", 1): held.chunk()})


def test_compare_runs__finds_the_planted_difference_and_says_how_large_it_is() -> None:
    run = synthetic_run(layers=LAYERS)
    labels = run["text/resid_post"].to_dataset()
    row = int(np.flatnonzero((labels["sample_index"] == 7) & (labels["position"] == 6))[0])
    values = labels["resid_post"].values.astype(float)

    def plant(values: np.ndarray) -> None:
        values[1, row, 4] += 2.5

    result = compare_runs(run, changed(run, "text/resid_post", plant))
    found = result.sel(site="text/resid_post")
    assert found["max_difference"].values.tolist() == pytest.approx([0, 2.5, 0], abs=1e-6)
    assert float(found["relative_difference"][1]) == pytest.approx(2.5 / np.abs(values[1]).max())
    assert float(found["relative_rms"][1]) == pytest.approx(2.5 / np.sqrt((values[1] ** 2).sum()))
    here = found.sel(layer=5)
    assert (here["worst_sample"].item(), here["worst_position"].item()) == ("sample-7", 6)
    assert here["worst_token"].item() == str(labels["token_text"].values[row])
    other = values[1, row].copy()
    other[4] += 2.5
    cosine = values[1, row] @ other / np.linalg.norm(values[1, row]) / np.linalg.norm(other)
    assert float(here["cosine_min"]) == pytest.approx(cosine)
    count = labels.sizes["token"]
    assert float(here["cosine"]) == pytest.approx((count - 1 + cosine) / count)
    assert int(here["n_token"]) == count
    assert float(result.sel(site=["text/q", "text/k", "text/resid_post_last"])["max_difference"].max()) == 0
    assert {"text/q", "text/k"} <= set(result["site"].values.tolist())


def test_compare_runs__does_not_depend_on_blocks_and_chunks() -> None:
    run = synthetic_run(layers=LAYERS)
    rng = np.random.default_rng(0)
    noisy = changed(run, "text/q", lambda values: np.add(values, rng.normal(size=values.shape), out=values))
    whole = compare_runs(run, noisy)
    for size, chunk in ((2000, 3), (5000, 100)):
        again = run["text/q"].to_dataset(inherit=False).chunk(token=chunk)
        blocks = compare_runs(with_groups(run, text_q=again), noisy, max_bytes=size)
        xr.testing.assert_allclose(blocks, whole)


def test_compare_runs__shared_layers_heads_and_tokens_only() -> None:
    run = synthetic_run(layers=LAYERS)
    query = run["text/q"].to_dataset(inherit=False)
    rows = np.flatnonzero(query["is_last_prompt"].values)
    less = with_groups(run, text_q=query.isel(token=rows, layer=[0, 2], head=[1, 3]))
    for pair in ((run, less), (less, run)):
        result = compare_runs(*pair, names=["text.q"])
        assert result["layer"].values.tolist() == [3, 8]
        assert float(result["max_difference"].max()) == 0
        assert result["n_token"].values.tolist() == [12]
    every = compare_runs(run, less)
    assert np.isnan(every["max_difference"].sel(site="text/q", layer=5))
    assert every["worst_position"].sel(site="text/q", layer=5).item() == -1


def test_compare_runs__answers_count_as_far_as_they_are_the_same() -> None:
    run = synthetic_run(layers=LAYERS)

    def answer(values: np.ndarray) -> None:
        values[run["tokens/text/kind"].values == 3] += 1

    def residual(values: np.ndarray) -> None:
        values[:, run["text/resid_post/kind"].values == 3] += 100

    other = changed(changed(run, "text/resid_post", residual), "tokens/text", answer, "token_id")
    found = compare_runs(run, other).sel(site="text/resid_post")
    assert float(found["max_difference"].max()) == 0
    assert int(found["n_token"]) == int((run["text/resid_post/kind"] != 3).sum())
    every = compare_runs(run, changed(run, "text/resid_post", residual))
    assert float(every["max_difference"].max()) == pytest.approx(100, abs=1e-4)


def test_compare_runs__samples_in_another_order_and_failed_ones() -> None:
    run = synthetic_run(layers=LAYERS)
    order = np.arange(12)[::-1]
    groups: dict[str, xr.Dataset] = {"samples": run["samples"].to_dataset(inherit=False).isel(sample=order)}
    for path in ("tokens/text", "text/q", "text/k", "text/resid_post"):
        held = run[path].to_dataset(inherit=False)
        owner = held["sample_index"].values
        rows = np.concatenate([np.flatnonzero(owner == sample) for sample in order])
        held = held.isel(token=rows)
        owner = (11 - held["sample_index"].values).astype(np.int32)
        groups[path.replace("/", "_")] = held.assign_coords(sample_index=("token", owner)).chunk(token=9)
    groups["text_resid_post_last"] = run["text/resid_post_last"].to_dataset(inherit=False).isel(sample=order)
    turned = with_groups(run, **groups)
    assert float(compare_runs(run, turned)["max_difference"].max()) == 0

    def fail(values: np.ndarray) -> None:
        values[4] = 1

    result = compare_runs(run, changed(turned, "samples", fail, "status"))
    assert (int(result["n_sample"]), int(result["n_excluded"])) == (11, 1)
    assert "sample-7" not in result["sample_id"].values


def test_compare_runs__top_option_and_prediction() -> None:
    run = synthetic_run(layers=LAYERS)
    table = run["samples"].to_dataset(inherit=False)
    logits = np.tile([3.0, 1.0, 2.0, np.nan], (12, 1)).astype(np.float32)
    table["option_logits"] = (("sample", "option"), logits)
    table["prediction"] = ("sample", np.array(["left"] * 12, object))
    first = with_groups(run, samples=table)
    other = table.copy(deep=True)
    other["option_logits"][2] = [1.0, 3.5, 2.0, np.nan]
    other["option_logits"][3] = [2.75, 1.0, 2.0, np.nan]
    other["option_logits"][4] = np.nan
    other["prediction"][2] = "right"
    result = compare_runs(first, with_groups(run, samples=other))
    assert result["top_option_agrees"].values.tolist() == [1, 1, 0, 1, -1, *[1] * 7]
    assert result["option_logit_difference"].values[[0, 2, 3]].tolist() == [0, 2.5, 0.25]
    assert np.isnan(result["option_logit_difference"][4])
    assert float(result["top_option_agreement"]) == pytest.approx(10 / 11)
    assert float(result["prediction_agreement"]) == pytest.approx(11 / 12)


def test_compare_runs__nan_in_both_is_the_same_and_in_one_an_error() -> None:
    run = synthetic_run(layers=LAYERS)

    def spoil(values: np.ndarray) -> None:
        values[2, 30] = np.nan

    broken = changed(run, "text/resid_post", spoil)
    assert float(compare_runs(broken, broken)["max_difference"].max()) == 0
    owner = run["text/resid_post/sample_index"].values[30]
    for pair in ((run, broken), (broken, run)):
        with pytest.raises(DataError, match=rf"resid_post of layer 8 has NaN .* 'sample-{owner}'"):
            compare_runs(*pair)


def test_compare_runs__refuses_what_is_not_the_same() -> None:
    run = synthetic_run(layers=LAYERS)
    start = int(np.flatnonzero(run["tokens/text/sample_index"].values == 5)[0])

    def token(values: np.ndarray) -> None:
        values[start + 6] = 77

    with pytest.raises(DataError, match="'sample-5' differs at position 6 of its prompt"):
        compare_runs(run, changed(run, "tokens/text", token, "token_id"))

    def rename(values: np.ndarray) -> None:
        values[3] = "sample-x"

    with pytest.raises(DataError, match="'sample-3' is in the first run only, as are 0 others"):
        compare_runs(run, changed(run, "samples", rename, "sample_id"))

    def twice(values: np.ndarray) -> None:
        values[3] = "sample-4"

    double = changed(run, "samples", twice, "sample_id")
    with pytest.raises(DataError, match="'sample-4' is twice"):
        compare_runs(double, double)
    wide = synthetic_run(Plan(layers=LAYERS, d_model=10))["text/resid_post"].to_dataset(inherit=False)
    with pytest.raises(DimensionError, match="the same shape"):
        compare_runs(run, with_groups(run, text_resid_post=wide))
    with pytest.raises(MissingSiteError, match="no 'text/z'"):
        compare_runs(run, run, names=["text/z"])
    other = xr.DataTree.from_dict(
        {path: run[path].to_dataset(inherit=False) for path in ("/", "samples", "tokens/text")}
    )
    with pytest.raises(DataError, match="no site is in both"):
        compare_runs(run, other)


def test_row_spans__cover_every_row_once_and_stay_within_the_bound() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        count = int(rng.integers(1, 60))
        first = np.sort(rng.choice(500, count, replace=False))
        second = rng.choice(500, count, replace=False) if rng.random() < 0.5 else first + 3
        spans = list(row_spans(first, second, 40))
        assert [row for span in spans for row in range(*span)] == list(range(count))
        for begin, end in spans:
            for rows in (first[begin:end], second[begin:end]):
                assert (np.diff(rows) > 0).all()
                assert rows[-1] - rows[0] < 40


def small(path: Path, shift: float = 0) -> Path:
    with RunWriter.create(path, small_run.ATTRIBUTES, small_run.groups(), samples=4) as writer:
        for sample in range(4):
            rows = small_run.rows(sample)
            if sample == 2:
                rows["text/resid_post"]["resid_post"][1, 250, 3] += shift
            writer.append(rows, samples=1)
        writer.finish()
    return path


def test_compare__prints_and_stores_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = small(tmp_path / "a"), small(tmp_path / "b", 0.5)
    before = read_manifest(first)
    command = ["compare", str(first), str(second)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "5.00e-01" in said
    assert f"s2 @250 'wörd{(250 * 7 + 2) % 97}'" in said
    assert "answers the same in 4 of 4" in said
    name = f"compare_{read_manifest(second).run_id}"
    assert str(first / "derived" / name) in said
    stored = open_run(first)[f"derived/{name}"].to_dataset()
    assert float(stored["max_difference"].sel(site="text/resid_post", layer=1)) == pytest.approx(0.5)
    assert stored.attrs["second"]["run_id"] == read_manifest(second).run_id
    assert read_manifest(first) == before
    assert verify_run(first) == []
    # Again, it takes the place of the first; a tolerance decides what a script sees.
    assert main([*command, "--tolerance", "0.5"]) == 0
    assert main([*command, "--tolerance", "0.01", "--no-store"]) == 1
    assert "above the tolerance 0.01" in capsys.readouterr().out
    assert main(["compare", str(first), str(tmp_path / "none")]) == 2


@pytest.fixture(scope="module")
def dtypes(tmp_path_factory: pytest.TempPathFactory) -> list[xr.DataTree]:
    from mechanistic.capture.datasets import open_dataset
    from mechanistic.capture.job import capture_run

    folder = tmp_path_factory.mktemp("dtypes")
    sites = ["text.*.resid_post", "text.1-2.q[text]", "text.*.attn_stats", "text.*.pattern[last]"]
    for dtype in ("float32", "bfloat16"):
        dataset = open_dataset("shapes", num_samples=12, seed=0)
        wanted = [*sites, "vision.*.resid_post"]
        capture_run("spatial-tiny", dataset, folder / dtype, sites=wanted, dtype=dtype, quiet=True)
    return [open_run(folder / dtype) for dtype in ("float32", "bfloat16")]


def test_compare_runs__bfloat16_against_float32(dtypes: list[xr.DataTree]) -> None:
    result = compare_runs(*dtypes)
    assert result.attrs["differing"] == ["model.dtype is 'float32', not 'bfloat16'"]
    names = {str(name).split("/")[1] for name in result["site"].values}
    assert names == {"resid_post", "resid_post_last", "q", "attn_stats", "pattern"}
    known = result["relative_difference"].values[~np.isnan(result["relative_difference"].values)]
    assert 1e-4 < known.min() < known.max() < 0.05
    assert float(result["cosine_min"].min()) > 0.999
    assert float(result["top_option_agreement"]) == 1
    # The plain definition, for one site.
    first, second = (run["text/q"].to_dataset()["q"].values.astype(float) for run in dtypes)
    here = result.sel(site="text/q", layer=[1, 2])
    apart = np.abs(first - second)
    np.testing.assert_allclose(here["max_difference"], apart.max(axis=(1, 2, 3)))
    np.testing.assert_allclose(here["relative_difference"], [
        a.max() / np.abs(f).max() for a, f in zip(apart, first, strict=True)
    ])  # fmt: skip
    pattern = [run["text/pattern"].to_dataset()["pattern"].values for run in dtypes]
    found = result["max_difference"].sel(site="text/pattern")
    np.testing.assert_allclose(found, np.abs(pattern[0] - pattern[1]).max(axis=(1, 2)), rtol=1e-6)
    assert np.isnan(result["cosine"].sel(site="text/pattern")).all()
    assert set(result["worst_token"].sel(site="text/pattern").values) == {"assistant"}


def test_compare_runs__a_run_and_itself(dtypes: list[xr.DataTree]) -> None:
    result = compare_runs(dtypes[0], dtypes[0])
    assert float(result["max_difference"].max()) == 0
    np.testing.assert_allclose(result["cosine_min"].sel(site="text/resid_post"), 1)
    assert result.attrs["differing"] == []
