"""Capture jobs: resumed runs equal uninterrupted ones, existing outputs are safe, errors lose nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from tiny_models import Listed, llava, picture, samples

import mechanistic.capture.backend as backend
import mechanistic.capture.batch_job as batch_job
import mechanistic.capture.job as job
from mechanistic.capture.forward import to_host
from mechanistic.capture.job import capture_run, price_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.sites import resolve_sites
from mechanistic.capture.specification import parse_sites
from mechanistic.store import RunWriter, open_run, read_manifest, site
from mechanistic.store.errors import (
    CaptureError,
    DatasetError,
    DiskFullError,
    IncompleteRunError,
    OutputExistsError,
    SpecificationError,
    UsageError,
)

SITES = ("text.*.resid_post[text]", "text.*.q[text]", "text.*.k", "vision.*.resid_post")
TEXT_ONLY = replace(samples(1)[0], images=())


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Windows of one batch, so that small runs have several."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mechanistic.capture.batch_plan.WINDOW_BATCHES", 1)
        patched.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
        patched.setattr("mechanistic.store.layout.TABLE_ROWS", 2000)
        yield


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "run"
    capture(loaded, path)
    return path


def capture(loaded: LoadedModel, path: Path, *, count: int = 10, **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "sites": SITES,
        "batch_size": 3,
        "max_new_tokens": 2,
        "quiet": True,
        **changed,
    }
    dataset = settings.pop("dataset", Listed(samples(count, images=(1, 2))))
    return capture_run(loaded, dataset, path, **settings)


def assert_same(first: Path, second: Path) -> None:
    """Every array of two runs, bit for bit, and every label."""
    one, other = open_run(first), open_run(second)
    assert one.groups == other.groups
    for group in one.groups:
        xr.testing.assert_identical(
            one[group].to_dataset().drop_attrs(), other[group].to_dataset().drop_attrs()
        )
    assert one["text/q"].attrs == other["text/q"].attrs


class Killed(BaseException):
    """What a kill at this place would do: nothing after it runs."""


def test_capture_run__holds_every_table_and_site(whole: Path) -> None:
    run = open_run(whole)
    held = run["samples"].to_dataset()
    assert held.sizes["sample"] == 10
    assert held.options.values[0].tolist() == ["left", "right", "above", "below"]
    assert held["number"].values.tolist() == list(range(10))
    assert held["number"].dtype == np.int64
    assert held["even"].dtype == bool
    assert [str(note) for note in held["note"].values[:2]] == ["n0", "n1"]
    assert run.attrs["capture"]["sites"] == [
        "text.*.resid_post[text]",
        "text.*.q[text]",
        "text.*.k[all]",
        "vision.*.resid_post[all]",
    ]
    assert run.attrs["proven"]["stacks"]["text"]["masks"] == ["causal"]
    assert run["text/resid_post_last"].to_dataset().resid_post_last.shape == (3, 10, 32)
    every, words = run["tokens/text"].to_dataset(), site(run, "text/q")
    assert (words.kind.values != 1).all()
    assert words.sizes["token"] == int((every.kind.values != 1).sum())


def test_capture_run__last_group_is_the_last_prompt_token(whole: Path) -> None:
    run = open_run(whole)
    words = site(run, "text/resid_post")
    rows = np.flatnonzero(words.is_last_prompt.values)
    np.testing.assert_array_equal(
        words.resid_post.values[:, rows], run["text/resid_post_last"].to_dataset().resid_post_last.values
    )


def test_capture_run__keeps_the_images_as_they_came(whole: Path) -> None:
    run = open_run(whole)
    table, data = run["images"].to_dataset(), run["image_bytes"].to_dataset().data.values
    assert table.sample_index.values.tolist()[:4] == [0, 1, 1, 2]
    for row in range(table.sizes["image"]):
        start, length = int(table.start[row]), int(table.length[row])
        stored = Image.open(io.BytesIO(data[start : start + length].tobytes()))
        number, index = int(table.sample_index[row]), int(table.image_index[row])
        np.testing.assert_array_equal(np.array(stored), np.array(picture(10 * number + index)))


def test_capture_run__without_images_stores_only_their_table(loaded: LoadedModel, tmp_path: Path) -> None:
    capture(loaded, tmp_path / "run", count=2, images=False)
    run = open_run(tmp_path / "run")
    assert "image_bytes" not in run
    assert run["images"].to_dataset().start.values.tolist() == [-1] * 3


def test_capture_run__questions_without_an_image_have_no_patches(loaded: LoadedModel, tmp_path: Path) -> None:
    asked = tuple(
        replace(sample, images=sample.images * (number % 2)) for number, sample in enumerate(samples(4))
    )
    capture(loaded, tmp_path / "run", dataset=Listed(asked), batch_size=1)
    run = open_run(tmp_path / "run")
    assert sorted(set(run["tokens/vision"].to_dataset().sample_index.values.tolist())) == [1, 3]
    words = run["tokens/text"].to_dataset()
    assert (words.kind.values[words.sample_index.values == 2] != 1).all()


def test_capture_run__a_selection_may_be_of_no_token_at_all(loaded: LoadedModel, tmp_path: Path) -> None:
    sites = ["text.*.q[answer]", "text.*.resid_post[answer]", "text.*.pattern[answer]", "text.*.k"]
    capture(loaded, tmp_path / "run", count=2, max_new_tokens=0, sites=sites)
    run = open_run(tmp_path / "run")
    assert site(run, "text/q").sizes["token"] == 0
    assert site(run, "text/pattern").sizes["entry"] == 0
    assert site(run, "text/k").sizes["token"] == run["tokens/text"].sizes["token"]


def test_capture_run__without_answers_scores_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    capture(loaded, tmp_path / "run", count=2, max_new_tokens=0)
    held = open_run(tmp_path / "run")["samples"].to_dataset()
    assert held.correct.values.tolist() == [-1, -1]
    assert np.isfinite(held.option_logits.values).all()


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_capture_run__resumed_after_a_kill_equals_uninterrupted(
    loaded: LoadedModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    path = tmp_path / "run"
    kill_after(batches, monkeypatch)
    with pytest.raises(Killed):
        capture(loaded, path)
    monkeypatch.undo()
    committed = read_manifest(path).samples
    assert committed == 3 * batches
    with pytest.raises(IncompleteRunError):
        open_run(path)
    assert capture(loaded, path).captured == 10 - committed
    assert_same(whole, path)


def kill_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit every batch, and die while the next one is computed, without any clean-up of the job's own."""
    monkeypatch.setattr(batch_job, "COMMIT_SECONDS", -1.0)
    forward, seen = backend.capture_forward, []

    def die(*args: Any, **kwargs: Any) -> Any:
        if len(seen) == batches:
            monkeypatch.setattr(RunWriter, "commit", lambda writer: None)
            raise Killed
        seen.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(backend, "capture_forward", die)


def test_capture_run__interrupted_commits_the_batches_it_has(
    loaded: LoadedModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    forward, seen = backend.capture_forward, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "capture_forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            capture(loaded, path)
    assert read_manifest(path).samples == 6
    capture(loaded, path)
    assert_same(whole, path)


def test_capture_run__batch_size_moves_nothing_beyond_rounding(
    loaded: LoadedModel, whole: Path, tmp_path: Path
) -> None:
    capture(loaded, tmp_path / "run", batch_size=1)
    one, other = open_run(whole), open_run(tmp_path / "run")
    for name in ("resid_post", "q", "k"):
        mine, theirs = site(one, f"text/{name}"), site(other, f"text/{name}")
        np.testing.assert_allclose(mine[name].values, theirs[name].values, rtol=0, atol=2e-5)
        xr.testing.assert_identical(mine.drop_vars(name).drop_attrs(), theirs.drop_vars(name).drop_attrs())


def test_capture_run__finished_has_nothing_to_do(
    loaded: LoadedModel, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_model", None)
    monkeypatch.setattr(backend, "prove", None)
    summary = capture(loaded, whole)
    assert (summary.captured, summary.samples) == (0, 10)
    assert "nothing to do" in summary.message()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sites": ["text.*.resid_post"]}, "capture.sites"),
        ({"batch_size": 4}, "capture.batch_size is 3, not 4"),
        ({"count": 11}, "dataset.num_samples is 10, not 11"),
    ],
)
def test_capture_run__refuses_a_finished_run_of_another_job(
    loaded: LoadedModel, whole: Path, changed: dict[str, Any], says: str
) -> None:
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(OutputExistsError, match=says):
        capture(loaded, whole, **changed)
    assert (whole / "manifest.json").read_bytes() == before


def test_capture_run__refuses_an_unfinished_run_of_another_job(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        capture(loaded, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(OutputExistsError, match="batch_size"):
        capture(loaded, tmp_path / "run", batch_size=2)
    with pytest.raises(OutputExistsError, match="model"):
        capture(llava(seed=1), tmp_path / "run")
    assert read_manifest(tmp_path / "run").samples == 3


def test_capture_run__refuses_what_is_no_run(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(OutputExistsError, match="is not a run"):
            capture(loaded, path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_capture_run__refuses_options_of_loading_for_a_model_that_is_loaded(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^num_samples: .* is loaded\.\n.*load_model"):
        capture_run(loaded, Listed(samples(2)), tmp_path / "run", num_samples=3)
    with pytest.raises(UsageError, match=r"^dtype: "):
        price_run(loaded, Listed(samples(2)), tmp_path / "run", dtype="float16")


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"sites": ["text.3.q"]}, SpecificationError, r"no layer 3 .*\n.*0-2"),
        ({"sites": ["text.*.k{2}"]}, SpecificationError, r"no head 2 .*\n.*0-1"),
        ({"dataset": Listed((TEXT_ONLY,))}, SpecificationError, "no sample of listed has an image"),
        ({"batch_size": 0}, UsageError, "batch_size=0"),
        ({"dataset": Listed(())}, DatasetError, "no samples"),
    ],
)
def test_capture_run__refuses_before_it_writes(
    loaded: LoadedModel, tmp_path: Path, changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        capture(loaded, tmp_path / "run", **changed)
    assert not list(tmp_path.iterdir())


def test_capture_run__columns_must_be_the_same_everywhere(loaded: LoadedModel, tmp_path: Path) -> None:
    one, two = samples(2)
    with pytest.raises(DatasetError, match=r"'s001'.*differ in their columns: even, note"):
        capture(loaded, tmp_path / "run", dataset=Listed((one, replace(two, extra={"number": 1}))))
    with pytest.raises(DatasetError, match="column 'number' is string, before int64"):
        capture(
            loaded, tmp_path / "run", dataset=Listed((one, replace(two, extra={**two.extra, "number": ""})))
        )


@pytest.mark.parametrize(("free", "error"), [(1000, DiskFullError), (10**9, None)])
def test_capture_run__stops_with_the_price_where_the_disk_is_too_small(
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    error: type[Exception] | None,
) -> None:
    monkeypatch.setattr("mechanistic.capture.price.free_bytes", lambda path: free)
    attempt: Callable[[], Any] = lambda: capture(loaded, tmp_path / "run", count=3)  # noqa: E731
    if error is None:
        assert attempt().captured == 3
    else:
        with pytest.raises(error, match=r"needs about .* are free"):
            attempt()
        assert not (tmp_path / "run").exists()


def test_capture_run__asks_before_more_than_100_gb(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechanistic.capture.price.LARGE", 1000)
    with pytest.raises(UsageError, match=r"more than .*\n.*--yes"):
        capture(loaded, tmp_path / "run", count=3)
    assert capture(loaded, tmp_path / "run", count=3, yes=True).captured == 3


def test_capture_run__stores_bfloat16_exactly_and_float16_on_request(tmp_path: Path) -> None:
    loaded = llava(dtype=torch.bfloat16)
    capture(loaded, tmp_path / "run", count=3, sites=["text.*.resid_post", "text.*.k:float16"])
    run = open_run(tmp_path / "run")
    residual, key = site(run, "text/resid_post"), site(run, "text/k")
    assert (residual.resid_post.dtype, residual.attrs["source_dtype"]) == (np.float32, "bfloat16")
    exact = torch.from_numpy(residual.resid_post.values)
    assert torch.equal(exact.to(torch.bfloat16).float(), exact)
    assert (key.k.dtype, key.attrs["source_dtype"]) == (np.float16, "bfloat16")


def test_capture_run__refuses_a_cast_that_overflows(tmp_path: Path) -> None:
    loaded = llava()
    with torch.no_grad():
        loaded.anatomy.stack("text").layers[1].mlp.down_proj.weight.mul_(1e6)  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"text\.1\.resid_post has values up to .* float16 cannot hold"):
        capture(loaded, tmp_path / "run", count=1, sites=["text.*.resid_post:float16"])


def test_to_host__casts_nothing_in_silence(loaded: LoadedModel) -> None:
    half, widened = (
        resolve_sites(parse_sites([text]), loaded.anatomy, "float16")[0]
        for text in ("text.1.mlp_out", "text.1.mlp_out:float32")
    )
    rows = torch.tensor([[1.5, 1e-9]])
    with pytest.raises(CaptureError, match=r"text\.1\.mlp_out is torch\.float32, the model float16"):
        to_host(rows, half, 1)
    np.testing.assert_array_equal(to_host(rows, widened, 1), rows.numpy())
    np.testing.assert_array_equal(to_host(rows.half(), half, 1), rows.half().numpy())
