"""The notebooks run from top to bottom: on the demo's run without torch, or on the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook__runs(path: Path, demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHANISTIC_RUN", str(demo_run))
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [], "commit notebooks without outputs"
        exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)
