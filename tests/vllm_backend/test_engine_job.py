"""Jobs on the real engine: the command, its processes, resume, parts, preemption, and what stops a job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import LONG, LONG_ANSWER, QUESTIONS, SOME, dataset, sites, some_sites
from library_alone import ANSWER
from same_runs import assert_same_runs

import mechanistic.capture.vllm_backend as vllm_backend
import mechanistic.capture.vllm_engine as vllm_engine
import mechanistic.capture.vllm_recorder as vllm_recorder
import mechanistic.capture.vllm_spool as vllm_spool
from mechanistic.analysis import compare_runs
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import load_model
from mechanistic.capture.repair import repair_run
from mechanistic.capture.vllm_engine import check_names
from mechanistic.store import open_run, read_manifest
from mechanistic.store.errors import CaptureError, UsageError
from mechanistic.store.merge import merge_run

LOST = ("text/resid_post/resid_post", "vision/q/q")


def test_capture_command__answers_400_questions_as_transformers_does(zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-m", "mechanistic.analysis.cli", "capture", "--model-name", "spatial-tiny"]
    command += ["--backend", "vllm", "--engine-option", "max_model_len=256", "--batch-size", "40"]
    command += ["--dataset", "shapes", "--num-samples", str(QUESTIONS), "--output-dir", str(path), "--quiet"]
    done = subprocess.run(
        [*command, "--sites", "text.3.resid_post[last]"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{QUESTIONS} samples" in done.stdout
    # Everything equals, the 400 predictions among it.
    assert_same_runs(zoo / "shapes-run", path)
    held = open_run(path)["samples"].to_dataset()
    assert np.isfinite(held["option_logits"].values).any(1).all()
    assert (held["correct"].values == 1).mean() > 0.9


def test_engine_processes__a_mistake_in_a_hook_ends_the_job(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", here)
    failing = ("failing_extension.FailingExtension", "")
    monkeypatch.setattr(vllm_engine, "FIXED", {**vllm_engine.FIXED, "worker_extension_cls": failing})
    loaded = load_model(str(zoo / "llama"), backend="vllm", engine={"max_model_len": 256})
    path = tmp_path / "run"
    try:
        with pytest.raises(CaptureError, match=r"(?s)engine stopped.*ZeroDivisionError: a mistake in a hook"):
            capture_run(
                loaded,
                dataset("llama"),
                path,
                sites=SOME,
                batch_size=1,
                max_new_tokens=6,
            )
    finally:
        assert loaded.engine is not None
        loaded.engine.close()
    assert read_manifest(path).samples < 6


def test_engine_processes__two_that_share_the_heads_give_what_one_gives(zoo: Path, tmp_path: Path) -> None:
    loaded = load_model(
        str(zoo / "llava"), backend="vllm", engine={"tensor_parallel_size": 2, "max_model_len": 256}
    )
    settings: dict[str, Any] = {"batch_size": 6, "max_new_tokens": ANSWER, "quiet": True}
    try:
        capture_run(loaded, dataset("llava"), tmp_path / "run", sites=sites("llava"), **settings)
        assert [each["heads"] for worker in loaded.engine.engine.workers for each in worker["layers"]] == [
            2
        ] * 4
    finally:
        loaded.engine.close()
    assert_same_runs(zoo / "llava-run", tmp_path / "run")


def test_capture_run__continued_after_a_kill_equals_uninterrupted(
    zoo: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, data = engine(zoo / "llama"), dataset("llama")
    settings: dict[str, Any] = {"sites": SOME, "batch_size": 1, "max_new_tokens": 2, "quiet": True}
    capture_run(loaded, data, tmp_path / "whole", **settings)
    honest, seen = vllm_backend.VllmBackend.capture, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return honest(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(vllm_backend.VllmBackend, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture_run(loaded, data, tmp_path / "run", **settings)
    assert read_manifest(tmp_path / "run").samples == 4
    capture_run(loaded, data, tmp_path / "run", **settings)
    assert (
        read_manifest(tmp_path / "run").content_sha256() == read_manifest(tmp_path / "whole").content_sha256()
    )
    for index in range(2):
        capture_run(loaded, data, tmp_path / "parts", part=(index, 2), **settings)
    merge_run(tmp_path / "parts")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_repair_run__puts_back_what_was_lost_and_the_run_compares_as_before(
    zoo: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    loaded, data, path = engine(zoo / "llava"), dataset("llava", 3), tmp_path / "run"
    sites = ("text.*.resid_post", "vision.*.q")
    capture_run(loaded, data, path, sites=sites, batch_size=2, max_new_tokens=1, quiet=True)
    capture_run(loaded, data, tmp_path / "again", sites=sites, batch_size=2, max_new_tokens=1, quiet=True)
    lost = [next(each for each in (path / name / "c").rglob("*") if each.is_file()) for name in LOST]
    for file in lost:
        file.unlink()
    done = repair_run(path, loaded, data)
    assert len(done.places) == len(lost)
    assert all(file.exists() for file in lost)
    compared = compare_runs(open_run(tmp_path / "again"), open_run(path))
    assert float(compared["relative_difference"].max()) < 1e-6


@pytest.mark.parametrize("name", LONG)
def test_capture_run__preempted_requests_are_computed_again_and_agree(
    name: str, zoo: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    again: set[int] = set()
    honest = vllm_spool.place_rows

    def watched(labels: Any, wanted: Any, what: str) -> Any:
        found = honest(labels, wanted, what)
        again.update(labels[found.again[:, 1], 0].tolist())
        return found

    monkeypatch.setattr(vllm_spool, "place_rows", watched)
    # Room for the keys of two of the six at full length.
    tight = engine(zoo / name, block_size=32, num_gpu_blocks_override=11, max_model_len=192)
    settings: dict[str, Any] = {"batch_size": 6, "max_new_tokens": LONG_ANSWER, "quiet": True}
    capture_run(tight, dataset(name), tmp_path / "run", sites=some_sites(name), **settings)
    assert again, "nothing was preempted"
    assert_same_runs(zoo / f"{name}-long-run", tmp_path / "run")


def test_capture_run__rows_that_are_not_who_they_seem_end_the_job(
    zoo: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine(zoo / "llama")
    honest = vllm_recorder.spans_of_step

    def swapped(order: Any, scheduled: Any) -> Any:
        return honest(list(reversed(order)), scheduled)

    monkeypatch.setattr(vllm_recorder, "spans_of_step", swapped)
    with pytest.raises(CaptureError, match=r"(?s)engine stopped.*cannot be told apart: rows begin at"):
        capture_run(loaded, dataset("llama"), tmp_path / "run", sites=SOME, quiet=True)


def test_capture_run__a_sample_that_is_too_long_fails_alone(
    zoo: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    loaded = engine(zoo / "llama", max_model_len=18)
    done = capture_run(loaded, dataset("llama"), tmp_path / "run", sites=SOME, max_new_tokens=2, quiet=True)
    held = open_run(tmp_path / "run")["samples"].to_dataset()
    assert 0 < done.failed < 6
    (first, *_) = [text for text in held["error"].values.tolist() if text]
    assert "the engine takes 18" in first


@pytest.mark.parametrize(
    ("name", "hint"), [("max_modl_len", "Did you mean max_model_len"), ("colour", "those of vllm serve")]
)
def test_check_names__an_option_that_vllm_does_not_have(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"vLLM has no option '{name}'\.\n.*{hint}"):
        check_names({"max_num_seqs": 8, name: 3})
