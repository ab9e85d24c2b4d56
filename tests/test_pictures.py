"""Figures look as they did when somebody looked at them."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.testing.compare import compare_images
from pictures import IMAGES, PICTURES, draw

# The version that the references were drawn with; others place texts a little differently.
DRAWN_WITH = "3.11"
TOLERANCE = 2 if mpl.__version__.startswith(DRAWN_WITH) else 15


@pytest.mark.parametrize("name", PICTURES)
def test_pictures__are_what_was_looked_at(name: str, tmp_path: Path) -> None:
    different = compare_images(str(IMAGES / f"{name}.png"), str(draw(name, tmp_path)), TOLERANCE)
    assert different is None, (
        f"{different}\nLook at both; if the new one is right, python tests/pictures.py {name}"
    )


def test_pictures__a_changed_number_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pictures.RISE", np.array([0.26, 0.41, 0.84, 0.93]))
    assert compare_images(str(IMAGES / "probe.png"), str(draw("probe", tmp_path)), TOLERANCE) is not None


def test_pictures__each_has_a_sentence_that_says_what_is_seen() -> None:
    captions = dict(re.findall(r"^- `(\w+)\.png`: (.+)$", (IMAGES / "README.md").read_text(), re.MULTILINE))
    assert set(captions) == set(PICTURES) == {path.stem for path in IMAGES.glob("*.png")}
    assert all(len(caption) > 60 for caption in captions.values())


def test_pictures__are_small() -> None:
    assert sum(path.stat().st_size for path in IMAGES.glob("*.png")) < 250_000
