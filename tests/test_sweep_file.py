"""Numbers of a sweep outlive the process that fills them, and leave the run as it is."""

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
from mechanistic.store.errors import OutputExistsError, SpecificationError
from mechanistic.store.merge import merge_run
from mechanistic.store.sweep_file import close_sweep, open_sweep, sweep_folder
from mechanistic.store.verify import verify_run

PARAMETERS = {"layers": (0, 1), "metric": "logit_diff"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run.write_run(tmp_path / "run")


def test_open_sweep__goes_on_where_it_was_killed(run: Path) -> None:
    code = (
        "import os, signal, sys; from mechanistic.store.sweep_file import open_sweep\n"
        "with open_sweep(sys.argv[1], 'a', {'layers': [0, 1], 'metric': 'logit_diff'}, (2, 3)) as values:\n"
        "    values[0, 1] = 7\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    with open_sweep(run, "a", PARAMETERS, (2, 3)) as values:
        assert values[0, 1] == 7
        assert np.isnan(values).sum() == 5
        values[1] = 1
    with open_sweep(run, "a", PARAMETERS, (2, 3)) as values:
        assert np.nansum(values) == 10


def test_open_sweep__leaves_the_run_as_it_is(run: Path) -> None:
    before = read_manifest(run)
    with open_sweep(run, "a", PARAMETERS, (2,)) as values:
        values[:] = 1
    assert read_manifest(run) == before
    assert verify_run(run) == []
    assert derived_names(open_run(run)) == []
    merge_run(run)
    close_sweep(run, "a")
    assert not sweep_folder(run, "a").exists()


def test_open_sweep__refuses_other_parameters_and_a_second_process(run: Path) -> None:
    with (
        open_sweep(run, "a", PARAMETERS, (2,)),
        pytest.raises(OutputExistsError, match="another process"),
        open_sweep(run, "a", PARAMETERS, (2,)),
    ):
        pass
    changed = {**PARAMETERS, "metric": "kl"}
    with (
        pytest.raises(OutputExistsError, match=r"other parameters.*metric is 'logit_diff', not 'kl'"),
        open_sweep(run, "a", changed, (2,)),
    ):
        pass
    with pytest.raises(SpecificationError, match="cannot be called"), open_sweep(run, "../a", {}, (2,)):
        pass
