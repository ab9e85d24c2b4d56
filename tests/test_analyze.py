"""`mechanistic analyze`: numbers, tables and pictures from a run, by name."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from synthetic_run import synthetic_run
from threadpoolctl import ThreadpoolController

from mechanistic.analysis import attention_mass, summarize, with_samples
from mechanistic.analysis.analyze import ANALYSES, Options
from mechanistic.analysis.cli import main
from mechanistic.store import open_run


def test_analyze__every_analysis_writes_its_result(demo_run: Path, tmp_path: Path) -> None:
    # Rollout needs the queries of every token, which the default capture does not keep; see below.
    names = [name for name in ANALYSES if name != "rollout"]
    assert main(["analyze", str(demo_run), *names, "--output-dir", str(tmp_path)]) == 0
    for name in names:
        stored = xr.open_zarr(tmp_path / f"{name}.zarr", consolidated=False)
        assert stored.data_vars, name
        with (tmp_path / f"{name}.csv").open() as file:
            assert len(list(csv.reader(file))) > 1, name


def test_analyze__says_what_to_capture(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(demo_run), "rollout", "--output-dir", str(tmp_path)]) == 2
    assert "--sites 'text.*.q[all]'" in capsys.readouterr().err


def test_analyze__rollout_is_drawn_over_layers(tmp_path: Path) -> None:
    run = synthetic_run(query_tokens="all")
    rollout = ANALYSES["rollout"]
    assert rollout.draw is not None
    result = rollout.compute(run, Options()).compute()
    rollout.draw(run, result, Options(by=("relation",)), tmp_path / "rollout")
    assert (tmp_path / "rollout_image.png").stat().st_size > 5000


def test_analyze__an_rdm_is_drawn_for_each_layer(tmp_path: Path) -> None:
    analysis = ANALYSES["rdm"]
    assert analysis.draw is not None
    run = synthetic_run()
    analysis.draw(run, analysis.compute(run, Options()), Options(), tmp_path / "rdm")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rdm_layer{layer}.png" for layer in range(4)]


def test_analyze__table_holds_the_split_means(demo_run: Path, tmp_path: Path) -> None:
    assert main(["analyze", str(demo_run), "mass", "--by", "relation", "--output-dir", str(tmp_path)]) == 0
    with (tmp_path / "mass.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["relation"] == "left" and row["layer"] == "2"]
    run = open_run(demo_run)
    mass = with_samples(attention_mass(run, tokens="last", layer=2), run, "relation")
    expected = summarize(mass, by="relation").sel(relation="left").compute()
    np.testing.assert_allclose(
        [float(r["mass_image"]) for r in rows], expected["mass_image"].values[0], rtol=1e-6
    )
    assert {row["n_sample"] for row in rows} == {"100"}
    assert (tmp_path / "mass_mass_image.png").stat().st_size > 5000


def test_analyze__names_what_exists(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(demo_run), "nonsense", "--output-dir", str(tmp_path)]) == 2
    assert "The analyses are: entropy" in capsys.readouterr().err
    assert main(["analyze", str(demo_run), "mass", "--by", "weather", "--output-dir", str(tmp_path)]) == 2
    assert "no column weather" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_analyze__leaves_one_blas_thread_to_each_of_dasks(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blas = ThreadpoolController().select(user_api="blas")
    inside: list[int] = []

    def look(*args: Any, **kwargs: Any) -> list[Path]:
        inside.extend(library["num_threads"] for library in blas.info())
        return []

    monkeypatch.setattr("mechanistic.analysis.analyze.analyze_run", look)
    before = blas.info()
    assert main(["analyze", str(demo_run), "mass", "--output-dir", str(tmp_path)]) == 0
    assert set(inside) == {1}
    assert blas.info() == before
