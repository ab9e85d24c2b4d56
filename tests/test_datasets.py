"""Datasets by name or path: what opens, and what a wrong name is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_sets import A_QUESTIONS, draw, write_coco, write_controlled, write_rows, write_vsr

from mechanistic.capture.dataset_problems import KINDS, Problem, problem_report
from mechanistic.capture.datasets import dataset_names, open_dataset
from mechanistic.capture.shapes import Shapes
from mechanistic.store.errors import DatasetError


def test_dataset_names__are_all_there() -> None:
    assert dataset_names() == (
        "shapes",
        "Controlled_Images_A",
        "Controlled_Images_B",
        "COCO_QA_one_obj",
        "COCO_QA_two_obj",
        "VG_QA_one_obj",
        "VG_QA_two_obj",
        "VSR",
    )


def test_open_dataset__shapes_takes_its_own_options() -> None:
    assert open_dataset("shapes", num_samples=8, seed=2, distractor=0.5) == Shapes(8, 2, 0.5)
    assert len(open_dataset("shapes")) == 400


def test_open_dataset__names_and_paths(tmp_path: Path) -> None:
    write_controlled(tmp_path / "whatsup")
    write_vsr(tmp_path / "vsr")
    draw(tmp_path / "mine/a.png", 1)
    write_rows(tmp_path / "mine/rows.jsonl", [{"image": "a.png", "question": "Where?", "answer": "left"}])
    named = open_dataset("Controlled_Images_A", data_root=tmp_path / "whatsup", num_samples=3, seed=1)
    assert (named.name, len(named)) == ("Controlled_Images_A", 3)
    assert len(open_dataset("VSR", data_root=tmp_path / "vsr", task="question")) == 3
    assert open_dataset(str(tmp_path / "mine")).name == "mine"
    assert open_dataset(tmp_path / "mine/rows.jsonl").name == "rows"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("controlled_images_b", r"no dataset 'controlled_images_b', .* Did you mean Controlled_Images_B or "),
        ("COCO_two", r"Did you mean COCO_QA_two_obj"),
        (
            "shape",
            r"Did you mean shapes\?\n  The datasets are shapes, Controlled_Images_A, .*, VSR; or give the",
        ),
        ("zzz", r"file or folder of that name\.\n  The datasets are"),
        (
            "questions.jsonl",
            r"There is no file or folder 'questions.jsonl'\.\n  Check the path; the datasets are",
        ),
        ("data/mine", r"There is no file or folder 'data/mine'"),
    ],
)
def test_open_dataset__says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(name)
    assert str(caught.value).count("\n") == 1


def test_open_dataset__a_question_file_alone_belongs_to_a_named_dataset(tmp_path: Path) -> None:
    write_controlled(tmp_path)
    with pytest.raises(
        DatasetError, match=r"is the question file of Controlled_Images_A; it does not say"
    ) as caught:
        open_dataset(tmp_path / "prompts" / A_QUESTIONS)
    assert f"--dataset Controlled_Images_A --data-root '{tmp_path / 'prompts'}'" in caught.value.hint


def test_open_dataset__refuses_options_that_it_would_ignore(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(
        DatasetError, match=r"COCO_QA_two_obj has no option 'split'\.\n  It has shuffle, text_only, task\."
    ):
        open_dataset("COCO_QA_two_obj", data_root=tmp_path, split="test")
    with pytest.raises(
        DatasetError, match=r"shapes has no option 'text_only'\.\n  It has distractor, split\."
    ):
        open_dataset("shapes", text_only=True)


def test_problem_report__counts_kinds_and_shows_a_few() -> None:
    problems = [Problem(row, "layout", f"crooked {row}") for row in range(5)] + [Problem(2, "names", "other")]
    assert problem_report("d", 9, problems, examples=2).split("\n") == [
        "d: 5 rows with problems, 9 samples",
        f"  names (1): {KINDS['names']}",
        "    row 2: other",
        f"  layout (5): {KINDS['layout']}",
        "    row 0: crooked 0",
        "    row 1: crooked 1",
        "    and 3 more",
    ]
    assert problem_report("d", 9, []) == ""
