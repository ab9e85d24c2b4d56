"""The whole command, killed and interrupted: what is continued equals what was never stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mechanistic.capture.interruption import Interruption
from mechanistic.store import read_manifest
from mechanistic.store.verify import verify_run

# Enough samples that a job lasts some seconds beyond its start.
COMMAND = """
import sys
from mechanistic.capture import batch_job, cli
batch_job.COMMIT_SECONDS = 0.5
import argparse
parser = argparse.ArgumentParser()
cli.add_commands(parser.add_subparsers())
import signal
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
args = parser.parse_args(sys.argv[1:])
try:
    sys.exit(args.run_command(args))
except KeyboardInterrupt:
    sys.exit(130)
"""
ASK = ["capture", "--model-name", "spatial-tiny", "--dataset", "shapes", "--num-samples", "300"]
SITES = ["--sites", "text.*.resid_post[text]", "text.*.k[all]", "--batch-size", "4", "--log-json"]
# Beyond the forward in hand; a second or two on an idle machine.
SECONDS_TO_LEAVE = 10


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, *ASK, *SITES, "--output-dir", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("whole") / "run"
    process = start(path)
    _, progress = process.communicate()
    assert process.returncode == 0, progress
    last = json.loads(progress.strip().splitlines()[-1])
    assert (last["samples"], last["failed"]) == (300, 0)
    assert last["bytes_written"] == read_manifest(path).stored_bytes
    return read_manifest(path).content_sha256()


def wait_until_begun(process: subprocess.Popen[str], path: Path) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_capture__signals_commit_and_leave_within_seconds(
    whole: str, tmp_path: Path, number: int, code: int
) -> None:
    path = tmp_path / "run"
    process = start(path)
    wait_until_begun(process, path)
    while process.poll() is None and not read_manifest(path).samples:
        time.sleep(0.02)
    process.send_signal(number)
    _, progress = process.communicate(timeout=SECONDS_TO_LEAVE)
    assert process.returncode == code
    held = read_manifest(path)
    assert f"{held.samples} of 300 samples are committed; the same command continues" in progress
    # Whole batches, also of the window in hand.
    assert 0 < held.samples < 300
    assert held.samples % 4 == 0
    assert held.state == "writing"
    assert verify_run(path) == []
    process = start(path)
    _, progress = process.communicate()
    assert process.returncode == 0
    assert f"has {held.samples} of 300 samples; continuing" in progress
    assert read_manifest(path).content_sha256() == whole


def test_capture__killed_at_random_moments(whole: str, tmp_path: Path) -> None:
    path, random, kills = tmp_path / "run", np.random.default_rng(2), 0
    while True:
        process = start(path)
        if kills < 3:
            wait_until_begun(process, path)
            time.sleep(random.uniform(0, 2.0 + 2.0 * kills))
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -9
    assert kills == 3
    assert read_manifest(path).content_sha256() == whole


def test_interruption__notes_the_first_signal_and_obeys_the_second() -> None:
    with Interruption() as interruption:
        interruption.check()
        signal.raise_signal(signal.SIGINT)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as leaving:
            interruption.check()
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
