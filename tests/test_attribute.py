"""`mechanistic attribute`: attributions of a dataset by name, with numbers and pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from mechanistic.analysis import attention_relevancy, attribution_sparsity
from mechanistic.analysis.attribute import METHODS
from mechanistic.analysis.cli import main
from mechanistic.capture import Shapes, load_model, path_gradients

ASK = [
    "--model-name",
    "spatial-tiny",
    "--dataset",
    "shapes",
    "--num-samples",
    "2",
    "--steps",
    "4",
    "--pictures",
    "1",
    "--output-dir",
]


def test_attribute__every_method_writes_its_result(tmp_path: Path) -> None:
    assert main(["attribute", *METHODS, *ASK, str(tmp_path)]) == 0
    for name in METHODS:
        stored = xr.open_zarr(tmp_path / f"{name}.zarr", consolidated=False)
        assert stored.attrs["model"] == "spatial-tiny"
        assert stored.sizes["sample"] == 2
        pictures = sorted(path.name for path in tmp_path.glob(f"{name}_*.png"))
        assert pictures == ([] if name == "words" else [f"{name}_0.png"])
    expected = attention_relevancy(load_model("spatial-tiny"), Shapes(2))["attention_relevancy"]
    stored = xr.open_zarr(tmp_path / "relevancy.zarr", consolidated=False)
    np.testing.assert_allclose(stored["attention_relevancy"], expected, rtol=0, atol=1e-7)
    with (tmp_path / "relevancy.csv").open() as file:
        rows = list(csv.DictReader(file))
    image = expected.isel(token=expected["kind"].values == 1)
    gini = attribution_sparsity(image)["attribution_gini"].values
    np.testing.assert_allclose([float(row["attribution_gini"]) for row in rows], gini, rtol=1e-5)
    assert [row["target"] for row in rows] == ["left - above", "right - above"]


def test_attribute__of_a_chosen_target(tmp_path: Path) -> None:
    command = ["attribute", "gradcam", *ASK, str(tmp_path), "--target", "left", "right"]
    assert main(command) == 0
    with (tmp_path / "gradcam.csv").open() as file:
        assert {row["target"] for row in csv.DictReader(file)} == {"left - right"}
    assert main(command) == 0, "a second time leaves the first as it is"


def test_attribute__goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(folder: str, steps: str = "4") -> int:
        return main(["attribute", "image-tokens", *ASK, str(tmp_path / folder), "--steps", steps])

    computed: list[int] = []
    original = path_gradients.path_integral

    def counted(loaded: Any, sample: Any, place: int, target: Any, path: Any) -> Any:
        computed.append(place)
        if computed == [0, 1]:
            raise KeyboardInterrupt
        return original(loaded, sample, place, target, path)

    monkeypatch.setattr(path_gradients, "path_integral", counted)
    assert ask("killed") == 130
    assert ask("killed") == 0
    assert computed == [0, 1, 1]
    assert ask("killed") == 0
    assert computed == [0, 1, 1]
    assert ask("whole") == 0
    stored = [
        xr.open_zarr(tmp_path / folder / "image-tokens.zarr", consolidated=False)
        for folder in ("killed", "whole")
    ]
    xr.testing.assert_identical(*(each.drop_attrs() for each in stored))
    capsys.readouterr()
    assert ask("killed", "5") == 2
    assert "steps is 4, not 5" in capsys.readouterr().err


def test_attribute__names_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["nonsense"], "The methods are: pixels, image-tokens"),
        (["pixels", "--target", "left", "right", "above"], "one word or two, not 3"),
        (["pixels", "--baseline", "black"], "no baseline 'black'"),
        (["pixels", "--model-name", "nobody"], "no model 'nobody'"),
    ):
        assert main(["attribute", *ASK, str(tmp_path), *wrong]) == 2
        assert said in capsys.readouterr().err
