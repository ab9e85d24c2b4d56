"""repair captures again exactly the samples whose data is damaged, and nothing else changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Listed, llava, samples

import mechanistic.capture.backend as backend
import mechanistic.capture.batch_job as batch_job
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.repair import repair_run
from mechanistic.store import read_manifest
from mechanistic.store.errors import OutputExistsError, StoreError
from mechanistic.store.lock import take_lock
from mechanistic.store.merge import merge_run
from mechanistic.store.verify import verify_run

DATA = Listed(samples(10, images=(1, 2)))
SETTINGS: dict[str, Any] = {
    "sites": ("text.*.resid_post[all]", "text.1.pattern[last]", "vision.*.q"),
    "batch_size": 2,
    "max_new_tokens": 2,
    "quiet": True,
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(autouse=True, scope="module")
def small_files() -> Iterator[None]:
    """Small windows, and shards that hold the tokens of few samples."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mechanistic.capture.batch_plan.WINDOW_BATCHES", 1)
        patched.setattr("mechanistic.store.layout.CHUNK_BYTES", 128 * 32 * 4)
        patched.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
        patched.setattr("mechanistic.store.layout.SHARD_ROWS_MIN", 256)
        patched.setattr("mechanistic.store.layout.TABLE_ROWS", 400)
        yield


@pytest.fixture(scope="module")
def captured(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair") / "run"
    capture_run(loaded, DATA, path, **SETTINGS)
    return path


@pytest.fixture
def run(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_repair__of_a_sound_run_does_nothing(loaded: LoadedModel, run: Path) -> None:
    assert "nothing to do" in repair_run(run, loaded, DATA).message()


def test_repair__loads_the_model_only_where_there_is_something_to_do(run: Path, tmp_path: Path) -> None:
    def refused() -> LoadedModel:
        raise AssertionError("loaded a model")

    assert "nothing to do" in repair_run(run, refused, DATA).message()
    flip(run / "text/resid_post/resid_post/c/0/0/0")
    with take_lock(run), pytest.raises(OutputExistsError, match="another process"):
        repair_run(run, refused, DATA)


def test_repair__recaptures_exactly_the_damaged_samples(
    loaded: LoadedModel, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(run).content_sha256()
    flip(run / "text/resid_post/resid_post/c/0/1/0")
    (run / "text/pattern/pattern/c/0/0/0").write_bytes(b"")
    problems = {problem.path: problem.samples for problem in verify_run(run)}
    wanted = problems["text/resid_post/resid_post/c/0/1/0"]
    assert 0 < len(wanted) < 10
    done = repair_run(run, loaded, DATA)
    assert done.same
    assert verify_run(run) == []
    assert read_manifest(run).content_sha256() == before
    flip(run / "text/resid_post/resid_post/c/0/1/0")
    seen: list[str] = []
    forward = backend.capture_forward

    def watched(model: Any, batch: Any, *rest: Any) -> Any:
        seen.extend(sample.sample_id for sample in batch.samples)
        return forward(model, batch, *rest)

    monkeypatch.setattr(backend, "capture_forward", watched)
    assert repair_run(run, loaded, DATA).samples == len(wanted)
    # The others of a batch run along: what is next to a sample decides its last bits.
    assert {f"s{row:03d}" for row in wanted} <= set(seen)
    assert len(seen) <= len(wanted) + 2


@pytest.mark.parametrize(
    "damage",
    [
        ("tokens/text/sample_index/c/0", "samples/status/c/0", "images/length/c/0"),
        ("text/resid_post/token_text/c/0", "image_bytes/data/c/0", "readout/unembed/c/0/0"),
        (
            "samples/sample_id/c/0",
            "text/pattern_rows/start/c/0",
            "text/resid_post_last/resid_post_last/c/0/0/0",
        ),
    ],
)
def test_repair__labels_images_tables_and_readout(
    loaded: LoadedModel, run: Path, damage: tuple[str, ...]
) -> None:
    before = read_manifest(run).content_sha256()
    for number, name in enumerate(damage):
        (run / name).unlink() if number else flip(run / name)
    assert {problem.path for problem in verify_run(run)} >= set(damage)
    assert repair_run(run, loaded, DATA).same
    assert verify_run(run) == []
    assert read_manifest(run).content_sha256() == before


def test_repair__parts_and_what_was_merged_of_them(loaded: LoadedModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for index in range(3):
        capture_run(loaded, DATA, run, part=(index, 3), **SETTINGS)
    flip(run / "parts/0001/text/resid_post/resid_post/c/0/0/0")
    assert [problem.path for problem in verify_run(run)] == ["parts/0001/text/resid_post/resid_post/c/0/0/0"]
    assert repair_run(run, loaded, DATA).same
    merge_run(run)
    flip(run / "text/resid_post/resid_post/c/0/0/0")
    assert repair_run(run, loaded, DATA).same
    assert verify_run(run) == []


def test_repair__refuses_another_model_dataset_or_an_unfinished_run(
    loaded: LoadedModel, run: Path, tmp_path: Path
) -> None:
    flip(run / "text/resid_post/resid_post/c/0/0/0")
    with pytest.raises(OutputExistsError, match=r"model\.name"):
        repair_run(run, llava(seed=1), DATA)
    with pytest.raises(OutputExistsError, match=r"dataset\.hash"):
        repair_run(run, loaded, Listed(samples(9, images=(1, 2))))


def test_repair__through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mechanistic.analysis.cli import main

    run = tmp_path / "run"
    ask = ["capture", "--model-name", "spatial-tiny", "--dataset", "shapes", "--num-samples", "6", "--quiet"]
    options = ["--model-option", "attn_implementation=eager", "--model-option", "use_safetensors=True"]
    assert main([*ask, "--output-dir", str(run), "--sites", "text.*.k", *options]) == 0
    before = read_manifest(run).content_sha256()
    flip(run / "text/k/k/c/0/0/0/0")
    assert main(["verify", str(run)]) == 1
    assert main(["repair", str(run)]) == 0
    assert "the content hash is what it was" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    assert read_manifest(run).content_sha256() == before


def test_repair__unfinished_run_is_continued_not_repaired(loaded: LoadedModel, tmp_path: Path) -> None:
    job = batch_job.Job(loaded, DATA, tmp_path / "run", _settings())
    job.open().close()
    with pytest.raises(StoreError, match="0 of 10 samples"):
        repair_run(tmp_path / "run", loaded, DATA)


def _settings() -> Any:
    from mechanistic.capture.run_description import CaptureSettings
    from mechanistic.capture.specification import parse_sites

    return CaptureSettings(parse_sites(SETTINGS["sites"]), 2, 2)
