"""What the tests of the vLLM backend share: settings for few cores, models, and runs to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Before vLLM is imported: processes that it starts inherit them.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the models, with what transformers makes of each beside it."""
    # A folder that was filled before saves half a minute while tests are written.
    given = os.environ.get("MECHANISTIC_VLLM_ZOO")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("zoo")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, HERE / "reference_runs.py", folder], check=True, env=environment)
    return folder


@contextmanager
def starting() -> Iterator[Callable[..., Any]]:
    """Loads models into engines in this very process, and stops them at the end."""
    from mechanistic.capture.models import load_model

    started: list[Any] = []

    def load(name: str | Path, **options: Any) -> Any:
        settings = {"in_process": True, "max_model_len": 512, "max_num_seqs": 8, **options}
        loaded = load_model(str(name), backend="vllm", engine=settings)
        started.append(loaded.engine)
        return loaded

    yield load
    for each in started:
        each.close()


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """`starting`, until the end of a test."""
    with starting() as load:
        yield load
