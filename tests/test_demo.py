"""The main job, end to end, on the model that comes with the project."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mechanistic.analysis import attention_mass, linear_probe
from mechanistic.analysis.cli import main
from mechanistic.analysis.demo import run_demo
from mechanistic.store import open_run
from mechanistic.store.verify import verify_run


def test_demo__store_is_sound_and_complete(demo_run: Path) -> None:
    assert verify_run(demo_run) == []
    samples = open_run(demo_run)["samples"]
    assert samples.sizes["sample"] == 400
    assert float(np.mean(samples["correct"].values == 1)) >= 0.97


def test_demo__relation_is_readable_late_at_the_last_token(demo_run: Path) -> None:
    run = open_run(demo_run)
    last = linear_probe(run, target="relation", tokens="last").compute()
    assert float(last["accuracy"].isel(layer=-1)) > 0.95
    assert float(last["accuracy"].isel(layer=-1)) > float(last["accuracy"].isel(layer=0)) + 0.4
    assert abs(float(last["shuffled_accuracy"].mean()) - 0.25) < 0.05
    mark = linear_probe(run, target="relation", tokens="'?'").compute()
    assert float(mark["accuracy_low"].isel(layer=-1)) > 0.25


def test_demo__last_token_looks_at_the_image(demo_run: Path) -> None:
    mass = attention_mass(open_run(demo_run), tokens="last")["mass_image"].mean(("token", "head"))
    assert float(mass.max()) > 0.25


def test_demo__page_is_one_file_with_every_figure(demo_folder: Path) -> None:
    page = (demo_folder / "index.html").read_text()
    assert page.count("<img") == len(list((demo_folder / "figures").glob("*.png"))) == 4
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_demo__again_captures_nothing(
    demo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (demo_folder / "run" / "manifest.json").read_bytes()
    monkeypatch.setattr("mechanistic.capture.job.load_model", None)
    assert run_demo(demo_folder, num_samples=400, seed=0) == 0
    assert (demo_folder / "run" / "manifest.json").read_bytes() == before
    assert "accuracy" in capsys.readouterr().out


def test_cli__errors_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    (tmp_path / "foreign").mkdir()
    assert main(["verify", str(tmp_path / "foreign")]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "demo", "capture", "info", "verify"])
def test_cli__help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert len(capsys.readouterr().out) > 200


def test_cli__info_and_verify(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(demo_run)]) == 0
    assert "spatial-tiny" in capsys.readouterr().out
    assert main(["verify", str(demo_run)]) == 0
    assert "is sound" in capsys.readouterr().out
