"""What'sUp and its COCO and VG subsets: small files of our own and, where they are, the published ones."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from published_sets import (
    A_QUESTIONS,
    COCO_QUESTIONS,
    VG_QUESTIONS,
    write_coco,
    write_controlled,
    write_rows,
    write_vg,
)

from mechanistic.capture.dataset import ImageError, open_image
from mechanistic.capture.question_text import listed
from mechanistic.capture.roles import role_spans
from mechanistic.capture.whatsup import open_whatsup
from mechanistic.capture.whatsup_annotations import SOURCES
from mechanistic.store.errors import DatasetError

PUBLISHED = Path(
    os.environ.get(
        "MECHANISTIC_QUESTION_FILES", Path(__file__).parents[2] / "shared" / "data" / "whatsup_prompts"
    )
)
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published question files are not here"
)


def kinds(problems: object, kind: str) -> list[int]:
    return [problem.row for problem in problems if problem.kind == kind]  # type: ignore[attr-defined]


def test_controlled__row_i_of_the_questions_is_row_i_of_the_annotations(tmp_path: Path) -> None:
    dataset = open_whatsup("Controlled_Images_A", write_controlled(tmp_path))
    assert (dataset.name, len(dataset), dataset.problems) == ("Controlled_Images_A", 8, ())
    sample = dataset[2]
    assert sample.sample_id == "Controlled_Images_A-0002"
    assert sample.images == (tmp_path / "data/controlled_images/toy-boat_under_chair.jpeg",)
    assert (sample.subject, sample.object, sample.relation, sample.answer) == (
        "toy boat",
        "chair",
        "under",
        "under",
    )
    assert sample.group == "Controlled_Images_A-toy-boat_chair"
    assert str(sample.extra["published_question"]).startswith("<image>\nUSER: Where is the toy boat in")
    assert (sample.extra["row"], sample.extra["problem"]) == (2, "")
    assert sample.extra["caption"] == "A toy-boat under a chair"
    assert open_image(sample.images[0]).size == (24, 16)


def test_controlled__a_set_differs_in_the_image_alone_and_its_answers_take_every_place(
    tmp_path: Path,
) -> None:
    dataset = open_whatsup("Controlled_Images_A", write_controlled(tmp_path), seed=3)
    for group in {sample.group for sample in dataset}:
        members = [sample for sample in dataset if sample.group == group]
        assert len({sample.question for sample in members}) == 1
        assert sorted(sample.answer_index for sample in members) == [0, 1, 2, 3]


def test_whatsup__the_text_lists_the_options_in_their_order(tmp_path: Path) -> None:
    for name, write in (("Controlled_Images_A", write_controlled), ("COCO_QA_two_obj", write_coco)):
        for sample in open_whatsup(name, write(tmp_path)):
            assert sample.question.endswith(f"? Answer with {listed(sample.options)}.")
            assert not set("<>\n") & set(sample.question)


def test_whatsup__shuffle_depends_on_the_seed_and_can_be_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    zero, one, plain = (
        open_whatsup("COCO_QA_two_obj", tmp_path, **options)  # type: ignore[arg-type]
        for options in ({}, {"seed": 1}, {"shuffle": False})
    )
    assert [sample.options for sample in zero] != [sample.options for sample in one]
    assert {sample.options for sample in plain} == {("left", "right", "above", "below")}
    assert len({sample.options for sample in zero}) > 1
    assert len({dataset.fingerprint() for dataset in (zero, one, plain)}) == 3


def test_whatsup__roles_are_found_in_the_question(tmp_path: Path) -> None:
    sample = open_whatsup("COCO_QA_two_obj", write_coco(tmp_path))[2]
    spans = role_spans(sample)
    assert [sample.question[slice(*span)] for span in spans["subject"]] == ["TV"]
    assert [sample.question[slice(*span)] for span in spans["object"]] == ["chair"]
    assert sorted(sample.question[slice(*span)] for span in spans["option"]) == sorted(sample.options)


def test_whatsup__captions_are_chosen_between_by_models_that_compare(tmp_path: Path) -> None:
    write_controlled(tmp_path)
    plain = open_whatsup("Controlled_Images_A", tmp_path)
    dataset = open_whatsup("Controlled_Images_A", tmp_path, task="caption")
    assert dataset.fingerprint() != plain.fingerprint()
    for sample, question in zip(dataset, plain, strict=True):
        assert sample.question == sample.answer == sample.extra["caption"]
        assert len(sample.options) == 4
        same = ("sample_id", "images", "relation", "subject", "object", "group", "extra")
        assert all(getattr(sample, name) == getattr(question, name) for name in same)
    for group in {sample.group for sample in dataset}:
        members = [sample for sample in dataset if sample.group == group]
        # Of the four images each has another right caption of the same four, in one order.
        assert sorted(sample.answer_index for sample in members) == [0, 1, 2, 3]
    published = json.loads((tmp_path / "data/controlled_images_dataset.json").read_text())
    ordered = open_whatsup("Controlled_Images_A", tmp_path, task="caption", shuffle=False)
    assert [list(sample.options) for sample in ordered] == [row["caption_options"] for row in published]


def test_whatsup__a_row_without_captions_to_choose_from_is_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    annotations = json.loads((tmp_path / "coco_qa_two_obj.json").read_text())
    assert [len(sample.options) for sample in open_whatsup("COCO_QA_two_obj", tmp_path, task="caption")] == [
        2
    ] * 6
    annotations[0] = annotations[0][:2]
    annotations[3][1] = ""
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps(annotations))
    dataset = open_whatsup("COCO_QA_two_obj", tmp_path, task="caption")
    assert kinds(dataset.problems, "no captions") == [0, 3]
    assert [sample.extra["row"] for sample in dataset] == [1, 2, 4, 5]


def test_whatsup__captions_need_their_images(tmp_path: Path) -> None:
    for options in ({"task": "statement"}, {"task": "caption", "text_only": True}):
        with pytest.raises(DatasetError, match=r"has no task .*\n.*question and caption"):
            open_whatsup("COCO_QA_two_obj", write_coco(tmp_path), **options)  # type: ignore[arg-type]


def test_coco__reports_dirty_rows_and_keeps_them(tmp_path: Path) -> None:
    dataset = open_whatsup("COCO_QA_two_obj", write_coco(tmp_path))
    assert len(dataset) == 6
    assert kinds(dataset.problems, "duplicate") == [1]
    assert kinds(dataset.problems, "contradiction") == [3]
    assert kinds(dataset.problems, "layout") == [2]
    assert kinds(dataset.problems, "answer") == [4]
    assert [sample.extra["problem"] for sample in dataset] == [
        "",
        "duplicate",
        "layout",
        "contradiction",
        "answer",
        "",
    ]
    assert dataset[4].answer == "right"
    assert dataset[0].group == dataset[1].group == "COCO_QA_two_obj-000000000139.jpg"
    report = dataset.problem_report()
    assert report.startswith("COCO_QA_two_obj: 4 rows with problems, 6 samples\n")
    assert "row 4: the answer is 'right', but 'A photo of a dog to the left of a bench' says 'left'" in report


def test_vg__says_what_it_made_of_each_dirty_row(tmp_path: Path) -> None:
    dataset = open_whatsup("VG_QA_two_obj", write_vg(tmp_path))
    usual = {"left", "right", "front", "behind", "above", "below"}
    # Asked with the usual options, because its own lack the answer.
    assert (set(dataset[1].options), dataset[1].answer) == (usual, "above")
    # The text after the options would give the answer away.
    assert dataset[2].extra["problem"] == "surplus text"
    assert "Option" not in dataset[2].question
    assert set(dataset[3].options) == {"behind", "front"}
    assert (dataset[4].answer, dataset[4].answer_index, dataset[4].extra["problem"]) == (None, -1, "answer")
    assert dataset[5].extra["problem"] == "names"
    assert dataset[6].extra["problem"] == ""
    assert kinds(dataset.problems, "names") == [5]
    assert "'A photo of a table to the left of a sofa'" in dataset.problem_report()


def test_whatsup__a_row_without_a_question_is_left_out_and_named(tmp_path: Path) -> None:
    write_controlled(tmp_path)
    path = tmp_path / "prompts" / A_QUESTIONS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["question"] = " "
    rows[5] |= {"id": 77, "answer": ["On", "Left"]}
    rows[6]["question"] = "<image>\nUSER: What is on the desk?\nASSISTANT:"
    write_rows(path, rows)
    dataset = open_whatsup("Controlled_Images_A", tmp_path)
    assert [sample.extra["row"] for sample in dataset] == [0, 1, 2, 4, 5, 6, 7]
    assert [(problem.row, problem.kind) for problem in dataset.problems] == [
        (3, "no question"),
        (5, "id"),
        (5, "answer"),
        (6, "wording"),
    ]
    assert dataset[4].answer is None
    assert (dataset[5].question, dataset[5].options) == ("What is on the desk?", ())


def test_whatsup__num_samples_takes_the_first_rows(tmp_path: Path) -> None:
    write_coco(tmp_path)
    three = open_whatsup("COCO_QA_two_obj", tmp_path, num_samples=3)
    everything = open_whatsup("COCO_QA_two_obj", tmp_path)
    assert list(three) == list(everything)[:3]
    assert three.fingerprint() != everything.fingerprint()
    assert [problem.row for problem in three.problems] == [2, 1]
    with pytest.raises(DatasetError, match=r"has 6 rows; 7 were asked for\.\n  Use --num-samples .*1 to 6"):
        open_whatsup("COCO_QA_two_obj", tmp_path, num_samples=7)


def test_whatsup__fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    one, two = write_coco(tmp_path / "one"), write_coco(tmp_path / "two")
    before = open_whatsup("COCO_QA_two_obj", one).fingerprint()
    assert before == open_whatsup("COCO_QA_two_obj", two).fingerprint()
    annotations = two / "coco_qa_two_obj.json"
    annotations.write_text(annotations.read_text().replace("885", "886"))
    assert open_whatsup("COCO_QA_two_obj", two).fingerprint() != before


def test_whatsup__a_missing_image_fails_only_where_it_is_opened(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "val2017/000000000872.jpg").unlink()
    sample = open_whatsup("COCO_QA_two_obj", tmp_path)[4]
    with pytest.raises(
        ImageError, match=r"Sample 'COCO_QA_two_obj-0004': image '.*000000000872.jpg' does not"
    ):
        open_image(sample.images[0], sample_id=sample.sample_id)


def test_whatsup__a_row_that_names_no_image_fails_and_is_never_asked_blindly(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "coco_qa_two_obj.json"
    rows = json.loads(path.read_text())
    rows[5] = ["?", rows[5][1]]
    path.write_text(json.dumps(rows))
    dataset = open_whatsup("COCO_QA_two_obj", tmp_path)
    assert kinds(dataset.problems, "image") == [5]
    with pytest.raises(ImageError, match="no image is named in row 5"):
        open_image(dataset[5].images[0])


def test_whatsup__question_file_alone_says_what_it_lacks(tmp_path: Path) -> None:
    write_coco(tmp_path / "all")
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "all" / COCO_QUESTIONS).rename(alone / COCO_QUESTIONS)
    with pytest.raises(DatasetError) as caught:
        open_whatsup("COCO_QA_two_obj", alone)
    assert "lacks coco_qa_two_obj.json (which image each question is about) and val2017/ (the images)" in str(
        caught.value
    )
    assert f"Put {COCO_QUESTIONS}, coco_qa_two_obj.json and val2017/ there" in caught.value.hint
    assert "text_only=True" in caught.value.hint
    assert str(caught.value).count("\n") == 1
    blind = open_whatsup("COCO_QA_two_obj", alone, text_only=True)
    assert len(blind) == 6
    assert {(sample.images, sample.group) for sample in blind} == {((), "")}


def test_whatsup__without_a_folder_says_what_to_put_in_one() -> None:
    with pytest.raises(
        DatasetError, match=rf"(?s)none was given.*--data-root FOLDER with {VG_QUESTIONS}, vg_qa"
    ):
        open_whatsup("VG_QA_two_obj")


def test_whatsup__finds_prompts_beside_the_data_folder(tmp_path: Path) -> None:
    write_controlled(tmp_path)
    assert len(open_whatsup("Controlled_Images_A", tmp_path / "data")) == 8


def test_whatsup__refuses_files_that_are_not_each_others(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "coco_qa_two_obj.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows[:-1]))
    with pytest.raises(DatasetError, match=r"has 6 rows, '.*' 5\.\n  Row i of one belongs to row i"):
        open_whatsup("COCO_QA_two_obj", tmp_path)
    path.write_text(json.dumps(rows[2:] + rows[:2]))
    with pytest.raises(
        DatasetError, match="are about other objects in 6 of 6 rows; row 0: the question is about"
    ):
        open_whatsup("COCO_QA_two_obj", tmp_path)


def test_whatsup__names_the_line_of_a_damaged_file(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / COCO_QUESTIONS
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DatasetError, match=r"line 6: not JSON \(.*\n  The file is damaged"):
        open_whatsup("COCO_QA_two_obj", tmp_path)


# From here on: the published question files themselves, without images.


PUBLISHED_SETS = {
    # name: rows, options, most frequent answer in %, and how many rows of each kind are dirty
    "Controlled_Images_A": (412, 4, 25.0, {}),
    "Controlled_Images_B": (408, 4, 25.0, {}),
    "COCO_QA_one_obj": (2247, 4, 33.1, {"layout": 24}),
    "COCO_QA_two_obj": (440, 4, 34.1, {"layout": 155}),
    "VG_QA_one_obj": (1160, 6, 33.8, {"options": 2, "layout": 94}),
    "VG_QA_two_obj": (291, 6, 47.1, {"options": 6, "surplus text": 2, "layout": 145}),
}


@needs_published
@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_published__rows_options_baselines_and_dirt(name: str) -> None:
    rows, options, baseline, dirt = PUBLISHED_SETS[name]
    dataset = open_whatsup(name, PUBLISHED, text_only=True)
    assert len(dataset) == rows
    assert max(len(sample.options) for sample in dataset) == options
    answers = Counter(sample.answer for sample in dataset)
    assert None not in answers
    assert round(100 * answers.most_common(1)[0][1] / rows, 1) == baseline
    assert Counter(problem.kind for problem in dataset.problems) == dirt
    for sample in dataset:
        assert sample.subject
        assert (sample.object == "") == name.endswith("one_obj")
        assert sample.question.endswith(f"? Answer with {listed(sample.options)}.")
        assert role_spans(sample)["subject"]


@needs_published
@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_published__the_right_option_has_no_fixed_place(name: str) -> None:
    dataset = open_whatsup(name, PUBLISHED, text_only=True)
    places = Counter(sample.answer_index for sample in dataset)
    share = max(places.values()) / len(dataset)
    assert share < 0.31
    if SOURCES[name].controlled:
        assert share == 0.25


@needs_published
@pytest.mark.parametrize("name", ["Controlled_Images_A", "Controlled_Images_B"])
def test_published__controlled_sets_are_complete(name: str) -> None:
    sets: dict[str, list[str]] = {}
    for sample in open_whatsup(name, PUBLISHED, text_only=True):
        sets.setdefault(sample.group, []).append(sample.relation)
    assert len(sets) == len(open_whatsup(name, PUBLISHED, text_only=True)) // 4
    assert {tuple(sorted(relations)) for relations in sets.values()} == {
        tuple(sorted(next(iter(sets.values()))))
    }


@needs_published
def test_published__the_leaked_answers_and_the_impossible_question_are_mended() -> None:
    dataset = open_whatsup("VG_QA_two_obj", PUBLISHED, text_only=True)
    assert "to the right of a woman" in str(dataset[84].extra["published_question"])
    assert "to the right of a woman" not in dataset[84].question
    assert dataset[56].answer == "above"
    assert "above" in dataset[56].options


@needs_published
def test_published__question_files_alone_say_what_they_lack() -> None:
    with pytest.raises(DatasetError, match=r"lacks coco_qa_one_obj\.json .* and val2017/"):
        open_whatsup("COCO_QA_one_obj", PUBLISHED)
