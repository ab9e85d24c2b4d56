"""Fixtures that several files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Model hubs and dataset hubs are never asked.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mechanistic demo` writes, made once."""
    from mechanistic.analysis.demo import run_demo

    folder = tmp_path_factory.mktemp("demo")
    assert run_demo(folder, num_samples=400, seed=0) == 0
    return folder


@pytest.fixture(scope="session")
def demo_run(demo_folder: Path) -> Path:
    """The run inside it."""
    return demo_folder / "run"
