"""Tables of questions: JSON lines, JSON lists and plain folders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from published_sets import write_rows
from question_tables import OPTIONS, draw_pictures, rows

from mechanistic.capture.dataset import ImageError, open_image
from mechanistic.capture.table_columns import one_type
from mechanistic.capture.tabular_dataset import open_tabular
from mechanistic.store.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path)


def test_jsonl__rows_become_samples_with_typed_coordinates(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", rows())
    dataset = open_tabular(folder / "questions.jsonl")
    assert (dataset.name, len(dataset), dataset.problems) == ("questions", 4, ())
    sample = dataset[2]
    assert sample.sample_id == "row-00002"
    assert sample.images == (folder / "pictures/2.png",)
    assert (sample.answer, sorted(sample.options)) == ("above", sorted(OPTIONS))
    assert {name: type(value) for name, value in sample.extra.items()} == {
        "row": int,
        "published_question": str,
        "size": int,
        "distance": float,
        "seen": bool,
        "source": str,
        "problem": str,
    }
    assert (sample.extra["size"], sample.extra["seen"], sample.extra["source"]) == (2, True, "camera 2")
    assert open_image(sample.images[0]).size == (24, 16)


def test_jsonl__the_text_shows_the_options_in_their_shuffled_order(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", rows(4) * 10)
    dataset = open_tabular(folder)
    for sample in dataset:
        assert sample.question.endswith("Choose {}, {}, or {}.".format(*sample.options))
        assert sample.extra["published_question"].endswith("Choose left, right, or above.")
    assert len({sample.options for sample in dataset}) == 6
    assert len({sample.answer_index for sample in dataset}) == 3
    plain = open_tabular(folder, shuffle=False)
    assert {sample.options for sample in plain} == {tuple(OPTIONS)}
    assert [sample.options for sample in open_tabular(folder, seed=1)] != [s.options for s in dataset]


def test_jsonl__options_in_another_form_keep_the_order_of_the_text(folder: Path) -> None:
    lettered = [row | {"question": "A. above  B. left  C. right", "answer": "above"} for row in rows() * 2]
    write_rows(folder / "questions.jsonl", lettered)
    dataset = open_tabular(folder)
    assert {sample.options for sample in dataset} == {("above", "left", "right")}
    assert [problem.kind for problem in dataset.problems] == ["order"]
    assert "the right option is number 1 in every sample" in dataset.problem_report()


def test_jsonl__missing_parts_are_read_from_a_question_of_the_known_form(folder: Path) -> None:
    text = (
        "<image>\nUSER: Where is the cup in relation to the big plate? Answer with left or right.\nASSISTANT:"
    )
    write_rows(folder / "q.jsonl", [{"image": "pictures/0.png", "question": text, "answer": "Left"}])
    sample = open_tabular(folder / "q.jsonl")[0]
    assert (sample.subject, sample.object, sorted(sample.options)) == ("cup", "big plate", ["left", "right"])
    assert sample.answer == "left"
    assert sample.question.startswith("Where is the cup in")
    assert "ASSISTANT" not in sample.question


def test_jsonl__dirty_rows_are_kept_and_named(folder: Path) -> None:
    table = rows()
    table[0] |= {"answer": "behind", "id": "a"}
    table[1] |= {"options": ["left", "left", "right", ""], "id": "a"}
    table[2] |= {"question": None, "id": "c"}
    table[3] |= {"image": None, "options": "left or right", "id": "d"}
    write_rows(folder / "questions.jsonl", table)
    dataset = open_tabular(folder)
    assert [sample.sample_id for sample in dataset] == ["a", "a-row-1", "d"]
    assert [sample.extra["problem"] for sample in dataset] == ["answer", "options; id", "options; image"]
    assert (dataset[0].answer, sorted(dataset[1].options), dataset[2].options) == (
        None,
        ["left", "right"],
        (),
    )
    assert "row 2: there is no question" in dataset.problem_report()
    with pytest.raises(ImageError, match=r"Sample 'd': image '.*no image is named in row 3"):
        open_image(dataset[2].images[0], sample_id="d")


def test_jsonl__a_missing_file_fails_where_it_is_opened(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", rows())
    (folder / "pictures/1.png").unlink()
    sample = open_tabular(folder)[1]
    with pytest.raises(ImageError, match=r"Sample 'row-00001': image '.*pictures/1.png' does not exist"):
        open_image(sample.images[0], sample_id=sample.sample_id)


def test_jsonl__columns_may_have_other_names(folder: Path) -> None:
    table = [
        {"photo": "0.png", "prompt": "Where?", "options": ["a", "b"], "answer": 1, "error": "none"}
        for _ in range(3)
    ]
    write_rows(folder / "questions.jsonl", table)
    with pytest.raises(DatasetError, match=r"has no column 'question'; it has photo, prompt, .*\n.*columns="):
        open_tabular(folder)
    names = {"question": "prompt", "image": "photo"}
    with pytest.raises(
        DatasetError, match=r"a column 'error', which is a run's own.*\n.*'their_error': 'error'"
    ):
        open_tabular(folder, columns=names)
    names["their_error"] = "error"
    with pytest.raises(DatasetError, match=r"answers are numbers .*\n.*answer_is='index'"):
        open_tabular(folder, columns=names)
    dataset = open_tabular(folder, columns=names, answer_is="index", data_root=folder / "pictures")
    assert (dataset[0].question, dataset[0].answer) == ("Where?", "b")
    assert dataset[0].extra["their_error"] == "none"
    assert open_image(dataset[0].images[0]).size == (24, 16)
    with pytest.raises(DatasetError, match="has no column 'foto'"):
        open_tabular(folder, columns={"image": "foto"})
    with pytest.raises(DatasetError, match="answer_is='letter' is neither"):
        open_tabular(folder, answer_is="letter")


def test_jsonl__without_images_says_so_or_asks_blindly(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", [{"question": "Where?", "answer": "left"}])
    with pytest.raises(
        DatasetError, match=r"has no column with images; it has question, answer\.\n  Call it"
    ):
        open_tabular(folder)
    sample = open_tabular(folder, text_only=True)[0]
    assert (sample.images, sample.options, sample.answer) == ((), (), "left")


def test_jsonl__several_images_and_absolute_paths(folder: Path) -> None:
    images = [str(folder / "pictures/0.png"), "pictures/1.png"]
    write_rows(folder / "questions.jsonl", [{"images": images, "question": "Which?"}])
    sample = open_tabular(folder)[0]
    assert sample.images == (folder / "pictures/0.png", folder / "pictures/1.png")


def test_json__a_list_of_rows_is_read_like_lines(folder: Path) -> None:
    (folder / "questions.json").write_text(json.dumps(rows()))
    assert open_tabular(folder / "questions.json")[3].answer == "left"
    (folder / "questions.json").write_text(json.dumps([rows()[0], 3]))
    with pytest.raises(DatasetError, match="row 1: expected an object, found a int"):
        open_tabular(folder / "questions.json")
    (folder / "questions.json").write_text("{}")
    with pytest.raises(DatasetError, match="expected a JSON list of rows, found a dict"):
        open_tabular(folder / "questions.json")


def test_fingerprint__follows_the_file_and_every_option(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", rows())
    prints = {
        open_tabular(folder, **options).fingerprint()  # type: ignore[arg-type]
        for options in ({}, {"seed": 1}, {"num_samples": 3}, {"text_only": True}, {"shuffle": False})
    }
    assert len(prints) == 5
    before = open_tabular(folder).fingerprint()
    assert before in prints
    write_rows(folder / "questions.jsonl", [*rows()[:3], rows()[3] | {"source": "camera 4"}])
    assert open_tabular(folder).fingerprint() != before


def test_open_tabular__refuses_what_is_no_table(folder: Path) -> None:
    (folder / "questions.csv").write_text("image,question\n")
    with pytest.raises(DatasetError, match=r"is not a table that can be read \(its name ends in '.csv'\)"):
        open_tabular(folder / "questions.csv")
    with pytest.raises(DatasetError, match=r"holds no table of questions\.\n  A folder needs one .jsonl"):
        open_tabular(folder)
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, rows())
    with pytest.raises(DatasetError, match=r"holds a.jsonl, b.jsonl\.\n"):
        open_tabular(folder)
    assert len(open_tabular(folder, split="a")) == 4
    with pytest.raises(DatasetError, match="is one file and has no splits"):
        open_tabular(folder / "a.jsonl", split="a")
    (folder / "a.jsonl").write_text('{"question": "?"}\n\n[1]\n')
    with pytest.raises(DatasetError, match="line 3: expected a JSON object, found a list"):
        open_tabular(folder / "a.jsonl")
    (folder / "a.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(DatasetError, match=r"is not UTF-8 text \(byte 14\)"):
        open_tabular(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("values", "expected", "changed"),
    [
        (["a", None], ["a", ""], ""),
        ([True, False], [True, False], ""),
        ([True, None], [1.0, math.nan], "lacks values: now 0, 1 and NaN"),
        ([1, 2], [1, 2], ""),
        ([1, None], [1.0, math.nan], "lacks values: now numbers and NaN"),
        ([1, 2.5], [1.0, 2.5], ""),
        ([0.5, None], [0.5, math.nan], ""),
        ([1, "a"], ["1", "a"], "holds int, str: now text"),
        ([True, 2], ["true", "2"], "holds bool, int: now text"),
        ([2**70], [str(2**70)], "holds int: now text"),
        ([["é"], {"b": 1}], ['["é"]', '{"b": 1}'], "holds dict, list: now text"),
        ([], [], ""),
    ],
)
def test_one_type__a_column_has_one_type(values: list[Any], expected: list[Any], changed: str) -> None:
    found, said = one_type(values)
    assert said == changed
    assert list(map(type, found)) == list(map(type, expected))
    assert repr(found) == repr(expected)


def test_json_tables__need_no_pyarrow_and_no_torch(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", rows())
    code = (
        "import sys; sys.modules['pyarrow'] = None;"
        "from mechanistic.capture.datasets import open_dataset;"
        f"open_dataset({str(folder)!r})[0];"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
