"""The experiments people have scripts for: one command captures, analyses and draws."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mechanistic.analysis.attention_maps import chosen_samples
from mechanistic.analysis.cli import main
from mechanistic.store import group, open_run, read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    assert main(command("attention_maps", folder)) == 0
    return folder


def command(name: str, folder: Path) -> list[str]:
    options = [
        "--model-name",
        "spatial-tiny",
        "--dataset",
        "shapes",
        "--num-samples",
        "8",
        "--num-shown",
        "1",
    ]
    return [name, *options, "--output-dir", str(folder), "--quiet"]


def test_attention_maps__captures_and_draws(folder: Path) -> None:
    first = str(group(open_run(folder / "run"), "samples")["sample_id"][0].values)
    expected = [f"{first}_{what}.png" for what in ("image", "words", "heads")]
    expected += ["image_share_by_head.png", "mass_mass_image.png", "entropy.csv", "concentration.zarr"]
    assert not [name for name in expected if not (folder / name).exists()]
    with (folder / "mass.csv").open() as file:
        assert {"mass_image", "mass_image_low", "correct", "n_sample"} <= set(next(csv.reader(file)))


def test_cross_attn_attribution__names_each_word_and_where_it_looks(folder: Path, tmp_path: Path) -> None:
    given = ["cross_attn_attribution", "--run", str(folder / "run"), "--num-shown", "1"]
    assert main([*given, "--output-dir", str(tmp_path)]) == 0
    with (tmp_path / "words.csv").open() as file:
        rows = list(csv.DictReader(file))
    samples = group(open_run(folder / "run"), "samples").compute()
    assert len({row["sample_id"] for row in rows}) == 8
    asked = [row["word"].split(" (")[0] for row in rows if row["sample_id"] == rows[0]["sample_id"]]
    assert asked == str(samples["question"][0].values).replace("?", " ?").split()
    assert all(0 < float(row["image_share"]) < 1 for row in rows)
    assert (tmp_path / "subject_image_share.png").exists()
    assert len(list(tmp_path.glob("*_words.png"))) == 1


def test_experiments__use_the_run_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_manifest(folder / "run")
    assert main(command("cross_attn_attribution", folder)) == 0
    assert read_manifest(folder / "run") == before
    other = command("attention_maps", folder)
    assert main([*other, "--seed", "7"]) == 2
    assert "a finished run of another job: capture.seed is 0, not 7" in capsys.readouterr().err


def test_experiments__need_a_model_and_a_dataset_or_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention_maps", "--model-name", "spatial-tiny"]) == 2
    assert main([*command("attention_maps", Path("x")), "--run", "x"]) == 2
    assert "--model-name and --dataset, or --run RUN" in capsys.readouterr().err


def test_chosen_samples__each_relation_in_turn(folder: Path) -> None:
    run = open_run(folder / "run")
    relations = [str(name) for name in group(run, "samples")["relation"].values]
    assert len({relations[sample] for sample in chosen_samples(run, 4)}) == 4
    assert sorted(chosen_samples(run, 100)) == list(range(8))
