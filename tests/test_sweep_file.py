"""What steps gave outlives the process that computed it, and leaves the run as it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_run

from mechanistic.store import derived_names, open_run, read_manifest
from mechanistic.store.errors import OutputExistsError
from mechanistic.store.sweep_file import open_sweep, sweep_folder
from mechanistic.store.verify import verify_run

PARAMETERS = {"layers": (0, 1), "metric": "logit_diff"}
ARRAYS = {
    "value": np.array([0.1, np.nan], np.float32),
    "count": np.array(7),
    "text": np.array(["▁a", "", "\0", "\ud800"], object),
    "none": np.zeros((0, 3), np.int16),
}


def test_open_sweep__goes_on_where_it_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; import numpy as np; from pathlib import Path\n"
        "from mechanistic.store.sweep_file import open_sweep\n"
        "with open_sweep(Path(sys.argv[1]), {'layers': [0, 1], 'metric': 'logit_diff'}) as steps:\n"
        "    for number in range(3):\n"
        "        assert steps.next() is None\n"
        "        steps.add({'value': np.array([number])})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        found = [steps.next() for _ in range(4)]
    assert [each and each["value"].tolist() for each in found] == [[0], [1], [2], None]


def test_step_file__gives_back_what_it_was_given(tmp_path: Path) -> None:
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        steps.add(ARRAYS)
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        found = steps.next()
    assert found is not None
    assert list(found) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("damage", ["cut", "zeros", "turned", "huge"])
def test_step_file__drops_a_step_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        for number in range(2):
            steps.add({"value": np.array([number])})
    path = tmp_path / "a" / "steps"
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:-1],
            "zeros": data[:half] + bytes(half),
            "turned": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
            "huge": data[:half] + b"\xff" * half,
        }[damage]
    )
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        assert steps.next() is not None
        assert steps.next() is None
        steps.add({"value": np.array([9])})
    with open_sweep(tmp_path / "a", PARAMETERS) as steps:
        found = [steps.next() for _ in range(3)]
    assert [each and each["value"].tolist() for each in found] == [[0], [9], None]


def test_open_sweep__leaves_the_run_as_it_is(tmp_path: Path) -> None:
    run = small_run.write_run(tmp_path / "run")
    before = read_manifest(run)
    with open_sweep(sweep_folder(run, "a"), PARAMETERS) as steps:
        steps.add(ARRAYS)
    assert read_manifest(run) == before
    assert verify_run(run) == []
    assert derived_names(open_run(run)) == []


def test_open_sweep__refuses_other_parameters_and_a_second_process(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with (
        open_sweep(folder, PARAMETERS),
        pytest.raises(OutputExistsError, match="another process"),
        open_sweep(folder, PARAMETERS),
    ):
        pass
    changed = {**PARAMETERS, "metric": "kl"}
    with (
        pytest.raises(OutputExistsError, match=r"other parameters.*metric is 'logit_diff', not 'kl'"),
        open_sweep(folder, changed),
    ):
        pass
