"""Samples that cannot be captured keep their place, are counted, and can be tried again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Listed, llava, picture, samples

import mechanistic.capture.backend as backend
from mechanistic.capture.answers import generate_answers
from mechanistic.capture.batch_attempts import attempt
from mechanistic.capture.dataset import ImageError, open_image
from mechanistic.capture.failures import failed_samples
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run, read_manifest, site
from mechanistic.store.errors import CaptureError
from mechanistic.store.verify import verify_run

SITES = ("text.*.resid_post[text]", "text.*.k", "text.1.pattern[last]", "vision.*.resid_post")
GOOD = samples(6, images=(1, 2))


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


def capture(loaded: LoadedModel, path: Path, asked: Any = GOOD, **changed: Any) -> Any:
    settings = {"sites": SITES, "batch_size": 2, "max_new_tokens": 2, "quiet": True, **changed}
    return capture_run(loaded, Listed(tuple(asked)), path, **settings)


def broken(kind: str, folder: Path) -> Path:
    path = folder / "broken.png"
    if kind == "no image":
        path.write_text("<html>not found</html>")
    if kind == "cut short":
        whole = io.BytesIO()
        picture(3).save(whole, "PNG")
        path.write_bytes(whole.getvalue()[:400])
    return path


@pytest.mark.parametrize("kind", ["missing", "no image", "cut short"])
def test_capture_run__a_broken_image_fails_its_sample_alone(
    loaded: LoadedModel, tmp_path: Path, kind: str
) -> None:
    bad = replace(GOOD[2], images=(broken(kind, tmp_path),))
    asked = (*GOOD[:2], bad, *GOOD[3:])
    done = capture(loaded, tmp_path / "run", asked)
    assert (done.samples, done.failed) == (6, 1)
    assert "1 failed" in done.message()
    run = open_run(tmp_path / "run")
    held = run["samples"].to_dataset()
    assert held["status"].values.tolist() == [0, 0, 1, 0, 0, 0]
    assert held["sample_id"].values[2] == "s002"
    assert "broken.png" in str(held["error"].values[2])
    assert held["forward_samples"].values.tolist() == [2, 2, 0, 1, 2, 2]
    assert 2 not in run["tokens/text"]["sample_index"].values
    assert np.isnan(run["text/resid_post_last"]["resid_post_last"].values[:, 2]).all()
    assert set(run["images"]["sample_index"].values.tolist()) == {0, 1, 3, 4, 5}
    assert verify_run(tmp_path / "run") == []
    assert [each.sample_id for each in failed_samples(tmp_path / "run")] == ["s002"]


def test_capture_run__a_processor_that_rejects_a_sample_fails_it(loaded: LoadedModel, tmp_path: Path) -> None:
    bad = replace(GOOD[0], question="what is <image> ?")
    done = capture(loaded, tmp_path / "run", (bad, GOOD[1]))
    assert done.failed == 1
    assert "the processor rejects it" in failed_samples(tmp_path / "run")[0].error


def test_capture_run__fail_fast_stops_with_the_windows_before_committed(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    bad = replace(GOOD[3], images=(broken("no image", tmp_path),))
    with pytest.raises(ImageError, match=r"'s003'.*broken\.png"):
        capture(loaded, tmp_path / "run", (*GOOD[:3], bad, *GOOD[4:]), fail_fast=True)
    assert read_manifest(tmp_path / "run").samples == 2
    assert capture(loaded, tmp_path / "run").failed == 0


def test_capture_run__retry_appends_what_succeeds(loaded: LoadedModel, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    asked = [replace(GOOD[0], images=(image,)), *GOOD[1:4], replace(GOOD[4], question="what is <image> ?")]
    path = tmp_path / "run"
    assert capture(loaded, path, asked).failed == 2
    picture(0).save(image)
    done = capture(loaded, path, asked, retry_failed=True)
    assert (done.captured, done.samples, done.failed) == (1, 6, 1)
    run = open_run(path)
    held = run["samples"].to_dataset()
    assert held["sample_id"].values.tolist() == ["s000", "s001", "s002", "s003", "s004", "s000"]
    assert held["status"].values.tolist() == [1, 0, 0, 0, 1, 0]
    assert verify_run(path) == []
    capture(loaded, tmp_path / "alone", GOOD[:1])
    mine, theirs = site(run, "text/k"), site(open_run(tmp_path / "alone"), "text/k")
    chosen = mine["sample_index"].values == 5
    np.testing.assert_allclose(mine["k"].values[:, chosen], theirs["k"].values, atol=2e-5)
    before = read_manifest(path)
    assert capture(loaded, path, asked, retry_failed=True).captured == 0
    assert read_manifest(path).content_sha256() == before.content_sha256()
    rows = run["text/pattern_rows"].to_dataset()
    assert (rows["start"].values == np.cumsum(rows["length"].values) - rows["length"].values).all()


def test_capture_run__nothing_that_can_be_captured_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    bad = replace(GOOD[0], images=(broken("no image", tmp_path),))
    with pytest.raises(ImageError, match=r"broken\.png"):
        capture(loaded, tmp_path / "run", (bad,))


def test_capture_run__out_of_memory_halves_the_batch_and_records_it(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = backend.capture_forward

    def small_device(model: Any, batch: Any, *rest: Any) -> Any:
        if len(batch.samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return forward(model, batch, *rest)

    monkeypatch.setattr(backend, "capture_forward", small_device)
    capture(loaded, tmp_path / "run", batch_size=3, quiet=False)
    held = open_run(tmp_path / "run")["samples"].to_dataset()
    assert held["forward_samples"].values.max() == 2
    assert held["status"].values.tolist() == [0] * 6
    assert "out of memory: samples 0 to 2 go on in two batches, of 2 at most" in capsys.readouterr().err


def test_attempt__one_sample_that_does_not_fit_is_an_error() -> None:
    def full(numbers: list[int]) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(CaptureError, match="Sample 4 does not fit in memory"):
        attempt([4, 5], full, lambda number, failure: {}, lambda text: None)


def test_attempt__other_errors_are_not_caught() -> None:
    def wrong(numbers: list[int]) -> Any:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt([4, 5], wrong, lambda number, failure: {}, lambda text: None)


def test_capture_run__an_answer_with_an_image_token_fails_its_sample_alone(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model would look for the features of an image that is not there."""
    calls = []

    def write(*args: Any) -> list[list[int]]:
        answers = generate_answers(*args)
        calls.append(len(answers))
        return [[loaded.anatomy.image_token_id or 0], *answers[1:]] if len(calls) == 4 else answers

    monkeypatch.setattr("mechanistic.capture.batch.generate_answers", write)
    assert capture(loaded, tmp_path / "run").failed == 1
    # The proof, three batches, and of the last the other sample once more.
    assert calls == [1, 2, 2, 2, 1]
    (failed,) = failed_samples(tmp_path / "run")
    assert failed.sample_id == "s004"
    assert "holds the token that marks an image" in failed.error


def test_capture__exits_3_with_failed_samples_until_they_are_made_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mechanistic.analysis.cli import main

    rows = []
    for number in range(4):
        sample = Shapes(4)[number]
        image: Any = sample.images[0]
        if number != 1:
            open_image(image).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": sample.question, "options": list(sample.options)}
        rows.append(json.dumps({**row, "answer": sample.answer}))
    table = tmp_path / "questions.jsonl"
    table.write_text("\n".join([*rows, json.dumps({"image": "0.png", "question": ""})]))
    ask = ["capture", "--model-name", "spatial-tiny", "--dataset", str(table), "--sites", "text.*.k"]
    ask += ["--output-dir", str(tmp_path / "run")]
    assert main(ask) == 3
    said = capsys.readouterr()
    assert "1 failed, which --retry-failed tries again" in said.out
    assert "there is no question" in said.err
    assert "failed: Sample" in said.err
    assert main([*ask, "--quiet", "--retry-failed"]) == 3
    assert "0 of the 1 that had failed are made good" in capsys.readouterr().out
    open_image(Shapes(4)[1].images[0]).save(tmp_path / "1.png")
    assert main([*ask, "--retry-failed"]) == 0
    assert open_run(tmp_path / "run")["samples"]["status"].values.tolist() == [0, 1, 0, 0, 0]
