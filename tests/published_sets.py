"""Small sets of our own in the published formats of What'sUp and VSR: drawn images, made-up rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

A_QUESTIONS = "Controlled_Images_A_with_answer_four_options.jsonl"
COCO_QUESTIONS = "COCO_QA_two_obj_with_answer_four_options.jsonl"
VG_QUESTIONS = "VG_QA_two_obj_with_answer_six_options.jsonl"

FILE_RELATIONS = {"left": "left_of", "right": "right_of", "on": "on", "under": "under"}
PAIRS = (("toy-boat", "chair"), ("gloves", "desk"))


def draw(path: Path, number: int) -> None:
    """A small picture, another one for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (24, 16), "white")
    ImageDraw.Draw(image).ellipse((number % 16, 2, number % 16 + 8, 10), fill=(20 * number % 255, 90, 160))
    image.save(path)


def asked(sentence: str, request: str) -> str:
    return f"<image>\nUSER: {sentence} {request}\nASSISTANT:"


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_controlled(root: Path) -> Path:
    """Two sets of four, in a mixed order, as data/ and prompts/ of one folder."""
    order = (0, 5, 3, 6, 1, 4, 2, 7)
    kinds = [(pair, relation) for pair in PAIRS for relation in FILE_RELATIONS]
    questions, annotations = [], []
    for row, ((subject, other), relation) in enumerate(kinds[place] for place in order):
        name = f"{subject}_{FILE_RELATIONS[relation]}_{other}.jpeg"
        draw(root / "data/controlled_images" / name, row)
        verb = "are" if subject == "gloves" else "is"
        sentence = f"Where {verb} the {subject.replace('-', ' ')} in relation to the {other}?"
        text = asked(sentence, "Answer with left, right, on or under.")
        questions.append({"id": row, "question": text, "answer": [relation.title()]})
        captions = [
            f"A {subject} {each} a {other}" for each in (relation, *(set(FILE_RELATIONS) - {relation}))
        ]
        image = f"data/controlled_images/{name}"
        annotations.append({"image_path": image, "caption_options": captions})
    write_rows(root / "prompts" / A_QUESTIONS, questions)
    (root / "data/controlled_images_dataset.json").write_text(json.dumps(annotations))
    return root


COCO_ROWS = (
    (139, "the oven", "the sink", "Left", "to the left of", ""),
    (139, "the oven", "the sink", "Left", "to the left of", ""),
    (785, "the TV", "the chair", "Above", "above", " "),
    (785, "the TV", "the chair", "Below", "below", ""),
    (872, "the dog", "the bench", "Right", "to the left of", ""),
    (885, "the fork", "the cup", "Left", "to the left of", ""),
)


def write_coco(root: Path) -> Path:
    """Rows with a duplicate, a contradiction, a doubled space, and an answer that the caption contradicts."""
    questions, annotations = [], []
    for row, (image, subject, other, answer, phrase, space) in enumerate(COCO_ROWS):
        draw(root / f"val2017/{image:012d}.jpg", row)
        comma = "," if row % 2 else ""
        text = asked(
            f"{space}Where is {subject} in relation to {other}?",
            f"Answer with left, right, above{comma} or below.",
        )
        questions.append({"id": row, "question": text, "answer": [answer]})
        names = [name.removeprefix("the ") for name in (subject, other)]
        annotations.append(
            [image, f"A photo of a {names[0]} {phrase} a {names[1]}", "A photo of something else"]
        )
    write_rows(root / COCO_QUESTIONS, questions)
    (root / "coco_qa_two_obj.json").write_text(json.dumps(annotations))
    return root


SIX = "Answer with left, right, front, behind, above or below."
OTHER_SIX = "Answer with left, right, front, behind, top, or bottom."
VG_ROWS = (
    ("the cart", "the green trees", SIX, "Front", "A photo of a cart in front of a green trees"),
    ("the girl", "the pillow", OTHER_SIX, "Above", "A photo of a girl on top of a pillow"),
    ("the man", "the horse", f"{SIX}\nOption A man to the left.", "Left", "A man to the left of a horse"),
    ("the desk", "the chair", "Answer with behind or front.", "Front", "A desk in front of a chair"),
    ("the kite", "the tree", SIX, "Nearby", "A kite above a tree"),
    ("the lamp", "the sofa", SIX, "Left", "A photo of a table to the left of a sofa"),
    ("the vase", "the window", SIX, "Behind", "A photo of a vase behind a window"),
)


def write_vg(root: Path) -> Path:
    """Rows with other options, an answer that is no option, text after the options, and another object."""
    questions, annotations = [], []
    for row, (subject, other, request, answer, caption) in enumerate(VG_ROWS):
        draw(root / f"vg_images/{230 + row}.jpg", row)
        text = asked(f"Where is {subject} in relation to {other}?", request)
        questions.append({"id": row, "question": text, "answer": [answer]})
        annotations.append([230 + row, caption, "A photo of something else"])
    write_rows(root / VG_QUESTIONS, questions)
    (root / "vg_qa_two_obj.json").write_text(json.dumps(annotations))
    return root


# The second names its subject wrongly, the third is in the older form without names.
VSR_ROWS = (
    ("The dog is behind the red chair.", 1, "behind", "dog", "red chair"),
    ("The handbag contains the cat.", 1, "contains", "andbag", "cat"),
    ("The cat is on top of the car.", 0),
    ("The bus is far away from the bench.", 1, "far away from", "bus", "bench"),
)
VSR_COLUMNS = ("caption", "label", "relation", "subj", "obj")


def write_vsr(root: Path) -> Path:
    """Four captions, two images from each COCO folder, and questions made of the true ones."""
    rows = []
    for number, row in enumerate(VSR_ROWS):
        folder = "train2017" if number < 2 else "val2017"
        name = f"{number + 40:012d}.jpg"
        draw(root / folder / name, number)
        link = f"http://images.cocodataset.org/{folder}/{name}"
        rows.append({"image": name, "image_link": link, **dict(zip(VSR_COLUMNS, row, strict=False))})
    write_rows(root / "test.jsonl", rows)
    asks = (
        (0, "dog", "red chair", "behind"),
        (1, "andbag", "cat", "contains"),
        (3, "bus", "bench", "far away from"),
    )
    request = "Answer with one word or phrase."
    write_rows(
        root / "VSR_with_answer.jsonl",
        [
            {"id": row, "question": asked(f"Where is the {a} in relation to {b}?", request), "answer": answer}
            for row, a, b, answer in asks
        ],
    )
    return root
