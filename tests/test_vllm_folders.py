"""Folders of a spool: none is lent again while numbers in it are mapped, and then it is filled anew."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch

from mechanistic.capture.vllm_folders import Folders, Lent
from mechanistic.capture.vllm_recorder import Recorder
from mechanistic.capture.vllm_spool import Spool

PLAN = {"text/resid_post": {"layers": [0], "selection": "text/all"}}


def leave(lent: Lent, values: torch.Tensor) -> None:
    """What a worker leaves of a sample with a row a value."""
    recorder = Recorder(PLAN)
    recorder._kept["text/resid_post", 0] = [values[:, None]]
    labels = np.stack([np.zeros(len(values), np.int64), np.arange(len(values))], axis=1)
    recorder._labels["text/all"] = [labels]
    recorder.write(lent.path / "rank0", {})


def read(lent: Lent, count: int) -> np.ndarray:
    with Spool(lent, 1, 1e-5) as spool:
        whole = spool.whole("text/resid_post", [0], "text/all", [np.arange(count)])
    assert whole is not None
    values: np.ndarray = whole.numpy()[0, :, 0]
    return values


def test_folders__are_lent_again_when_nothing_of_them_is_mapped(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    lent = folders.take()
    leave(lent, torch.arange(5000.0))
    first = read(lent, 5000)
    used = lent.path
    del lent
    other = folders.take()
    assert other.path != used
    leave(other, torch.zeros(10))
    view = first[100:200]
    del first
    gc.collect()
    assert folders.take().path != used
    np.testing.assert_array_equal(view, np.arange(100, 200))
    del view
    gc.collect()
    kept = folders.take(), folders.take()
    assert used in [each.path for each in kept]


def test_folders__shorter_numbers_over_longer_ones_are_read_alone(tmp_path: Path) -> None:
    lent = Lent(tmp_path)
    leave(lent, torch.arange(5000.0))
    size = (tmp_path / "rank0.text.resid_post").stat().st_size
    leave(lent, -torch.arange(7.0))
    np.testing.assert_array_equal(read(lent, 7), -np.arange(7))
    assert (tmp_path / "rank0.text.resid_post").stat().st_size == size
