"""Writers killed at random moments: what is resumed has the bytes of what was never interrupted."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mortal_writer
import numpy as np
import pytest

from mechanistic.store import layout, open_run, read_manifest
from mechanistic.store.errors import OutputExistsError
from mechanistic.store.merge import merge_run
from mechanistic.store.verify import verify_run

KILLS, INSIDE = 40, 10
WRITERS, WRITER_KILLS = 4, 10


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes start from a clean one that has imported the store, without this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mortal_writer"])
    return context


@pytest.fixture(scope="module")
def whole(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """The uninterrupted run, and the seconds that its process lived."""
    path = tmp_path_factory.mktemp("whole") / "run"
    warm = processes.Process(target=time.sleep, args=(0,))
    warm.start()
    warm.join()
    begun = time.monotonic()
    process = processes.Process(target=mortal_writer.write, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    yield path, time.monotonic() - begun
    shutil.rmtree(path)


def test_writer__killed_at_random_moments_and_resumed(
    processes: Any, whole: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = whole
    random, kills, inside, runs = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS or inside < INSIDE:
        path, finished = tmp_path / f"run{runs}", False
        while not finished:
            writing = processes.Value("i", 0)
            process = processes.Process(target=mortal_writer.write, args=(path, writing))
            process.start()
            process.join(random.uniform(0, seconds))
            process.kill()
            process.join()
            assert process.exitcode in (0, -9)
            finished = process.exitcode == 0
            kills += not finished
            inside += not finished and writing.value
        assert read_manifest(path).content_sha256() == read_manifest(expected).content_sha256()
        assert verify_run(path) == []
        # Beside the run too, where writers died that were creating it.
        assert not list(tmp_path.rglob("*.partial"))
        runs += 1
    print(f"{kills} kills, {inside} of them inside a write, {runs} runs")


def test_parts__four_writers_at_once_killed_at_random(
    processes: Any, whole: tuple[Path, float], tmp_path: Path
) -> None:
    path, random = tmp_path / "run", np.random.default_rng(1)
    left, kills = set(range(WRITERS)), 0
    while left:
        lived = {
            index: processes.Process(target=mortal_writer.write_part, args=(path, index, WRITERS))
            for index in left
        }
        for process in lived.values():
            process.start()
        for index, process in lived.items():
            process.join(random.uniform(0, whole[1] / 4) if kills < WRITER_KILLS else 120)
            process.kill()
            process.join()
            assert process.exitcode in (0, -9)
            kills += process.exitcode != 0
            left -= {index} if process.exitcode == 0 else set()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("CHUNK_BYTES", "SHARD_BYTES", "SHARD_ROWS_MIN", "TABLE_ROWS", "BYTE_ROWS"):
            patched.setattr(layout, name, getattr(layout, name))
        mortal_writer.small_layout()
        merge_run(path)
    assert kills >= WRITER_KILLS
    assert read_manifest(path).content_sha256() == read_manifest(whole[0]).content_sha256()


def test_parts__second_writer_of_a_part_is_refused(processes: Any, tmp_path: Path) -> None:
    ready = [
        processes.Process(target=mortal_writer.write_part, args=(tmp_path / "run", 0, 2)) for _ in range(3)
    ]
    for process in ready:
        process.start()
    for process in ready:
        process.join()
    # Whoever came while another wrote was refused; whoever came after had nothing to do.
    assert 0 in {process.exitcode for process in ready} <= {0, 1}
    part = tmp_path / "run" / "parts" / "0000"
    assert read_manifest(part).complete
    assert verify_run(part) == []


FULL = """
import resource, sys, mortal_writer
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
mortal_writer.write(Path(sys.argv[1]), small=sys.argv[3] == "small")
"""


def write_with_little_room(path: Path, limit: int, layout: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit), layout],
        cwd=Path(mortal_writer.__file__).parent,
        capture_output=True,
        text=True,
    )


def test_writer__no_room_for_a_shard_stops_cleanly_and_continues(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    stopped = write_with_little_room(path, 250_000, "large")
    assert stopped.returncode == 1
    assert "DiskFullError" in stopped.stderr
    assert "samples that are left of 16 need about" in stopped.stderr
    assert 0 < read_manifest(path).samples < mortal_writer.SAMPLES
    assert verify_run(path) == []
    held = open_run(path, allow_partial=True)["text/resid_post"]["resid_post"].values
    expected = open_run(whole[0])["text/resid_post"]["resid_post"].values
    np.testing.assert_array_equal(held, expected[:, : held.shape[1]])
    done = write_with_little_room(path, resource.RLIM_INFINITY, "large")
    assert done.returncode == 0, done.stderr
    held = open_run(path)["text/resid_post"]["resid_post"].values
    np.testing.assert_array_equal(held, expected)


def test_writer__a_full_file_system_stops_cleanly_and_continues(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root; the file size limit above shows the same")
    try:
        stopped = write_with_little_room(small / "run", resource.RLIM_INFINITY, "small")
        assert "DiskFullError" in stopped.stderr
        assert "No space left" in stopped.stderr
        assert verify_run(small / "run") == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = write_with_little_room(small / "run", resource.RLIM_INFINITY, "small")
        assert done.returncode == 0, done.stderr
        assert read_manifest(small / "run").content_sha256() == read_manifest(whole[0]).content_sha256()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_parts__the_root_is_made_once(tmp_path: Path) -> None:
    mortal_writer.open_root(tmp_path / "run", mortal_writer.ATTRIBUTES, parts=2)
    first = (tmp_path / "run" / "zarr.json").read_bytes()
    mortal_writer.open_root(tmp_path / "run", mortal_writer.ATTRIBUTES, parts=2)
    assert (tmp_path / "run" / "zarr.json").read_bytes() == first
    with pytest.raises(OutputExistsError, match="parts is 2, not 3"):
        mortal_writer.open_root(tmp_path / "run", mortal_writer.ATTRIBUTES, parts=3)
