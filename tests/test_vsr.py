"""Visual Spatial Reasoning, from small files of our own and, where it is, the published question file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from published_sets import write_rows, write_vsr

from mechanistic.capture.annotation_files import read_json_lines
from mechanistic.capture.dataset import open_image
from mechanistic.capture.question_text import parse_question
from mechanistic.capture.vsr import open_vsr
from mechanistic.store.errors import DatasetError

PUBLISHED = Path(
    os.environ.get(
        "MECHANISTIC_QUESTION_FILES", Path(__file__).parents[2] / "shared" / "data" / "whatsup_prompts"
    )
)


def test_vsr__statements_are_true_or_false(tmp_path: Path) -> None:
    dataset = open_vsr(write_vsr(tmp_path))
    assert (dataset.name, len(dataset)) == ("VSR", 4)
    assert [sample.answer for sample in dataset] == ["true", "true", "false", "true"]
    assert {tuple(sorted(sample.options)) for sample in dataset} == {("false", "true")}
    first = dataset[0]
    assert first.question == (
        'Consider this statement about the image: "The dog is behind the red chair." '
        f"Answer with {first.options[0]} or {first.options[1]}."
    )
    assert (first.subject, first.relation, first.object) == ("dog", "behind", "red chair")
    assert first.group == "VSR-000000000040.jpg"
    assert first.images == (tmp_path / "train2017/000000000040.jpg",)
    assert dataset[2].images == (tmp_path / "val2017/000000000042.jpg",)
    assert open_image(dataset[2].images[0]).size == (24, 16)


def test_vsr__names_that_the_caption_lacks_are_read_from_it_and_reported(tmp_path: Path) -> None:
    dataset = open_vsr(write_vsr(tmp_path))
    assert (dataset[1].subject, dataset[1].relation, dataset[1].object) == ("handbag", "contains", "cat")
    assert dataset[1].extra["problem"] == "names"
    assert "row 1: subject 'andbag' is not in 'The handbag contains the cat.'" in dataset.problem_report()
    # The older published form has neither relation nor names in columns of their own.
    assert (dataset[2].subject, dataset[2].relation, dataset[2].object) == ("cat", "on top of", "car")


def test_vsr__questions_belong_to_captions_by_their_id(tmp_path: Path) -> None:
    dataset = open_vsr(write_vsr(tmp_path), task="question")
    assert [sample.extra["row"] for sample in dataset] == [0, 1, 3]
    assert dataset[2].question == "Where is the bus in relation to bench? Answer with one word or phrase."
    assert (dataset[2].options, dataset[2].answer) == ((), "far away from")
    assert dataset[2].images == (tmp_path / "val2017/000000000043.jpg",)
    # The word of the question, so that its tokens are found; the mistake is reported.
    assert dataset[1].subject == "andbag"
    assert {problem.row for problem in dataset.problems} == {1}
    assert open_vsr(tmp_path).fingerprint() != dataset.fingerprint()


def test_vsr__a_false_caption_or_another_answer_is_reported(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    rows = read_json_lines(tmp_path / "VSR_with_answer.jsonl")
    rows[0]["id"] = 2
    write_rows(tmp_path / "VSR_with_answer.jsonl", rows)
    dataset = open_vsr(tmp_path, task="question")
    assert dataset[0].extra["problem"] == "names; answer"
    assert "'The cat is on top of the car.' is false" in dataset.problem_report()
    rows[0]["id"] = 4
    write_rows(tmp_path / "VSR_with_answer.jsonl", rows)
    with pytest.raises(DatasetError, match=r"row 0: it has no question, or its id 4 is no row of .* has 4"):
        open_vsr(tmp_path, task="question")


def test_vsr__a_label_that_is_neither_is_unscored(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    rows = read_json_lines(tmp_path / "test.jsonl")
    rows[3] |= {"label": "maybe", "image_link": None, "image": None}
    write_rows(tmp_path / "test.jsonl", rows)
    dataset = open_vsr(tmp_path)
    assert (dataset[3].answer, dataset[3].extra["problem"]) == (None, "answer; image")


def test_vsr__images_may_lie_in_one_folder(tmp_path: Path) -> None:
    write_vsr(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "images")
    assert open_vsr(tmp_path)[0].images == (tmp_path / "images/000000000040.jpg",)


def test_vsr__says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none was given\.\n  Give --data-root FOLDER with test.jsonl"):
        open_vsr()
    with pytest.raises(DatasetError, match=r"lacks dev.jsonl \(image_link, caption and label"):
        open_vsr(tmp_path, split="dev")
    with pytest.raises(DatasetError, match="VSR has no task 'guess'"):
        open_vsr(tmp_path, task="guess")
    write_vsr(tmp_path)
    (tmp_path / "VSR_with_answer.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"lacks VSR_with_answer.jsonl \(the questions"):
        open_vsr(tmp_path, task="question")
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DatasetError, match=r"lacks the images, in val2017/ or images/.\n  Put train2017/ and"
    ):
        open_vsr(tmp_path)
    assert open_vsr(tmp_path, text_only=True)[0].images == ()
    write_rows(tmp_path / "test.jsonl", [{"question": "?"}])
    with pytest.raises(DatasetError, match="is not a file of VSR: its rows have no caption"):
        open_vsr(tmp_path)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published question files are not here")
def test_published__every_vsr_question_parses() -> None:
    rows = read_json_lines(PUBLISHED / "VSR_with_answer.jsonl")
    parsed = [parse_question(row["question"]) for row in rows]
    assert len(parsed) == 629
    assert all(each is not None and each.object and not each.options and not each.surplus for each in parsed)
    assert Counter(row["answer"] for row in rows).most_common(1) == [("under", 57)]
    # A mistake of the published file: the questions about a handbag.
    assert sum(each is not None and "andbag" in (each.subject, each.object) for each in parsed) > 0
