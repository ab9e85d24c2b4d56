"""Images of the next batch are read while the model works on this one."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mechanistic.capture.read_ahead as read_ahead
from mechanistic.capture.dataset import LoadedImage, Sample, load_image
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import load_model
from mechanistic.capture.read_ahead import ReadAhead
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run
from mechanistic.store.reader import read_manifest


def picture(number: int) -> Sample:
    return Sample(str(number), (Image.new("RGB", (4, 3), (number, 0, 0)),), "?")


def test_read_ahead__gives_what_would_have_been_read() -> None:
    ahead = ReadAhead()
    ahead.start({1: picture(1)})
    assert ahead.sample(1, picture(9)).sample_id == "9"
    ahead.start({2: picture(2)})
    (loaded,) = ahead.sample(1, picture(9)).images
    assert isinstance(loaded, LoadedImage)
    assert loaded.encoded == load_image(picture(1).images[0]).encoded
    assert load_image(loaded) is loaded
    assert ahead.sample(2, picture(9)).sample_id == "9"


def test_read_ahead__leaves_a_broken_image_to_its_capture(tmp_path: Path) -> None:
    broken = replace(picture(1), images=(tmp_path / "missing.png",))
    ahead = ReadAhead()
    ahead.start({1: broken})
    ahead.start({})
    assert ahead.sample(1, picture(9)) is broken


def test_capture_run__reads_ahead_and_keeps_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scenes, threads = load_model("spatial-tiny"), Shapes(18), []
    options: dict[str, Any] = {"sites": ["text.*.resid_post[last]"], "batch_size": 3, "quiet": True}

    def noted(*args: Any, **kwargs: Any) -> LoadedImage:
        threads.append(threading.current_thread().name)
        return load_image(*args, **kwargs)

    monkeypatch.setattr(read_ahead, "load_image", noted)
    capture_run(model, scenes, tmp_path / "ahead", **options)
    # Two windows: only the first batch of the first is read by itself, all others while the model runs.
    assert len(threads) == 15
    assert all(name.startswith("read") for name in threads)
    monkeypatch.setattr(read_ahead, "_read", lambda sample: sample)
    capture_run(model, scenes, tmp_path / "plain", **options)
    one, other = (read_manifest(tmp_path / name) for name in ("ahead", "plain"))
    assert one.content_sha256() == other.content_sha256()
    images = open_run(tmp_path / "ahead")["image_bytes/data"].values
    assert np.array_equal(images, open_run(tmp_path / "plain")["image_bytes/data"].values)
