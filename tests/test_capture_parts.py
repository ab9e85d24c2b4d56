"""Parts of a job: one run whoever captured them, on one machine or on a cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from tiny_models import Listed, llava, samples

from mechanistic.capture import batch_plan
from mechanistic.capture.batch_plan import batches, committable, windows
from mechanistic.capture.cluster import capture_on_cluster
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run, read_manifest
from mechanistic.store.errors import IncompleteRunError, OutputExistsError, UsageError
from mechanistic.store.merge import merge_run

WINDOW_BATCHES = batch_plan.WINDOW_BATCHES
DATA = Listed(samples(8, images=(1, 2)))
SETTINGS: dict[str, Any] = {
    "sites": ("text.*.resid_post[text]", "text.1.pattern[last]", "text.*.k"),
    "batch_size": 2,
    "max_new_tokens": 2,
    "quiet": True,
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mechanistic.capture.batch_plan.WINDOW_BATCHES", 1)
        patched.setattr("mechanistic.store.layout.SHARD_BYTES", 1)
        patched.setattr("mechanistic.store.layout.TABLE_ROWS", 2000)
        yield


def assert_same(first: Path, second: Path) -> None:
    one, other = open_run(first), open_run(second)
    assert set(one.groups) == set(other.groups)
    for group in one.groups:
        if group != "/":
            xr.testing.assert_identical(one[group].to_dataset(), other[group].to_dataset())


def test_capture_run__parts_are_one_run_and_merge_into_that_of_one_writer(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for index in (1, 0):
        with pytest.raises(UsageError, match="There is no part 2 of 2"):
            capture_run(loaded, DATA, run, part=(2, 2), **SETTINGS)
        capture_run(loaded, DATA, run, part=(index, 2), **SETTINGS)
        if index:
            with pytest.raises(IncompleteRunError, match="part 0 never ran"):
                open_run(run)
    capture_run(loaded, DATA, tmp_path / "one", **SETTINGS)
    assert_same(tmp_path / "one", run)
    assert capture_run(loaded, DATA, run, part=(1, 2), **SETTINGS).captured == 0
    with pytest.raises(OutputExistsError, match="is a run in 2 parts"):
        capture_run(loaded, DATA, run, **SETTINGS)
    with pytest.raises(OutputExistsError, match="parts is 2, not 4"):
        capture_run(loaded, DATA, run, part=(1, 4), **SETTINGS)
    merge_run(run)
    assert_same(tmp_path / "one", run)
    assert read_manifest(run).content_sha256() == read_manifest(tmp_path / "one").content_sha256()
    for part in (None, (0, 2)):
        assert capture_run(loaded, DATA, run, part=part, **SETTINGS).captured == 0


def test_batches__are_of_similar_length_whatever_comes_before() -> None:
    asked = samples(20, images=(2, 1))
    planned = {
        start: [
            batches({n: asked[n] for n in window}, 3)
            for window in windows(range(start, 20), 3, 1.0)
            if window[0] >= 9
        ]
        for start in (0, 3, 9)
    }
    assert planned[0] == planned[3] == planned[9]
    assert sorted(number for window in planned[0] for batch in window for number in batch) == [*range(9, 20)]
    everything = batches(dict(enumerate(asked)), 10)
    assert everything == [list(range(1, 20, 2)), list(range(0, 20, 2))]


def test_windows__are_as_many_batches_as_may_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechanistic.capture.batch_plan.WINDOW_BATCHES", WINDOW_BATCHES)
    limit = batch_plan.WINDOW_BYTES
    for sample_bytes, sizes in (
        (1, [8, 8, 4]),
        (limit / 4, [4] * 5),
        (limit, [2] * 10),
        (9 * limit, [2] * 10),
    ):
        assert [len(window) for window in windows(range(20), 2, sample_bytes)] == sizes


def test_committable__is_whole_batches_from_the_beginning() -> None:
    plan = [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert committable(plan, range(8)) == [*range(8)]
    assert committable(plan, {0, 2, 4, 5}) == []
    assert committable(plan, {0, 1, 2, 3, 6, 7}) == [0, 1, 2, 3]
    assert committable(plan, {0, 1, 2, 3, 4}) == [0, 1, 2, 3]
    assert committable(plan, set()) == []


def test_cluster__has_the_content_of_one_process_also_where_a_worker_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from distributed import LocalCluster

    # The last is an option of from_pretrained, and none of ours.
    settings = {
        "sites": ("text.*.k",),
        "batch_size": 2,
        "dtype": "float32",
        "attn_implementation": "eager",
    }
    data = DyingOnce(16, tmp_path / "died")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        done = capture_on_cluster(
            cluster.scheduler_address, "spatial-tiny", data, tmp_path / "run", parts=4, quiet=True, **settings
        )
        monkeypatch.setattr("mechanistic.capture.cluster.capture_part", None)
        again = capture_on_cluster(
            cluster.scheduler_address, "spatial-tiny", data, tmp_path / "run", parts=4, quiet=True, **settings
        )
        assert again.captured == 0
    assert (tmp_path / "died").exists()
    assert (done.samples, done.failed) == (16, 0)
    held = open_run(tmp_path / "run")
    names = [Shapes(16)[number].sample_id for number in range(16)]
    assert held["samples"]["sample_id"].values.tolist() == names
    assert held.attrs["model"]["attention"] == "eager"
    # Workers have the windows of the library, and one thread.
    monkeypatch.setattr("mechanistic.capture.batch_plan.WINDOW_BATCHES", WINDOW_BATCHES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in range(4):
            alone = {**settings, "part": (index, 4), "quiet": True}
            capture_run("spatial-tiny", Shapes(16), tmp_path / "alone", **alone)
    finally:
        torch.set_num_threads(threads)
    assert_same(tmp_path / "alone", tmp_path / "run")


class DyingOnce(Shapes):
    """Shapes whose 13th sample kills, once, the process that asks for it after the survey."""

    def __init__(self, count: int, note: Path) -> None:
        super().__init__(count)
        self.note = note
        self.asked = 0

    def __getitem__(self, index: int, /) -> Any:
        self.asked += index == 12
        if self.asked == 2 and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_cluster__names_a_scheduler_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No dask scheduler answers"):
        capture_on_cluster("tcp://127.0.0.1:9", "spatial-tiny", DATA, tmp_path / "run", parts=2)
