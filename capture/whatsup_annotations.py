"""The annotation files of What'sUp and its COCO and VG subsets: each row's image, and what it shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .annotation_files import read_json_list
from .question_text import ParsedQuestion, mentions, same_name

# How file names and captions say what the options say.
_FILE_RELATIONS = {
    "left_of": "left",
    "right_of": "right",
    "in-front_of": "front",
    "behind": "behind",
    "on": "on",
    "under": "under",
}
_CAPTION_RELATIONS = ("left", "right", "above", "below", "top", "bottom", "front", "behind", "back")
_MEAN_THE_SAME = {"top": "above", "bottom": "below", "back": "behind"}


@dataclass(frozen=True)
class Source:
    """One published set: its question file, its annotation file and its folder of images."""

    name: str
    questions: str
    annotations: str
    images: str

    @property
    def controlled(self) -> bool:
        """Whether it consists of minimal-pair sets: the same two objects in every relation."""
        return self.name.startswith("Controlled")


SOURCES = {
    source.name: source
    for source in (
        Source(
            "Controlled_Images_A",
            "Controlled_Images_A_with_answer_four_options.jsonl",
            "controlled_images_dataset.json",
            "controlled_images",
        ),
        Source(
            "Controlled_Images_B",
            "Controlled_Images_B_with_answer_four_options.jsonl",
            "controlled_clevr_dataset.json",
            "controlled_clevr",
        ),
        Source(
            "COCO_QA_one_obj",
            "COCO_QA_one_obj_with_answer_four_options.jsonl",
            "coco_qa_one_obj.json",
            "val2017",
        ),
        Source(
            "COCO_QA_two_obj",
            "COCO_QA_two_obj_with_answer_four_options.jsonl",
            "coco_qa_two_obj.json",
            "val2017",
        ),
        Source(
            "VG_QA_one_obj", "VG_QA_one_obj_with_answer_six_options.jsonl", "vg_qa_one_obj.json", "vg_images"
        ),
        Source(
            "VG_QA_two_obj", "VG_QA_two_obj_with_answer_six_options.jsonl", "vg_qa_two_obj.json", "vg_images"
        ),
    )
}


@dataclass(frozen=True)
class Annotation:
    """One row: the image's file name, its right caption and others, and what a controlled image's name says.

    All are "" for a row that is not in the published form; names and relation are "" for photos, whose
    captions are read against the question.
    """

    image: str = ""
    caption: str = ""
    subject: str = ""
    object: str = ""
    relation: str = ""
    others: tuple[str, ...] = ()


def read_annotations(source: Source, path: Path) -> list[Annotation]:
    """Every row of the annotation file, in order (DatasetError if it is not a JSON list)."""
    parse = _parse_controlled if source.controlled else _parse_photo
    return [parse(entry, source) for entry in read_json_list(path)]


def wrong_names(annotation: Annotation, parsed: ParsedQuestion) -> str:
    """What the annotation says about the question's objects if it is not the same, else ""."""
    asked = [name for name in (parsed.subject, parsed.object) if name]
    if annotation.subject:
        shown = [annotation.subject, annotation.object]
        alike = len(asked) == 2 and all(map(same_name, asked, shown))
        return "" if alike else f"the question is about {' and '.join(asked)}, the image {annotation.image}"
    missing = [name for name in asked if not mentions(annotation.caption, name)]
    return (
        f"the question is about {' and '.join(missing)}, the caption {annotation.caption!r}"
        if missing
        else ""
    )


def wrong_relation(annotation: Annotation, parsed: ParsedQuestion, answer: str) -> str:
    """What the annotation says about the relation if it contradicts the answer, else "".

    A caption that names no relation, or several, contradicts nothing.
    """
    said = annotation.relation
    shown = {said} if said else _caption_relations(annotation.caption, parsed)
    if len(shown) != 1 or _meaning(answer) in map(_meaning, shown):
        return ""
    return f"the answer is {answer!r}, but {annotation.caption or annotation.image!r} says {shown.pop()!r}"


def _parse_controlled(entry: Any, source: Source) -> Annotation:
    path = entry.get("image_path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not path:
        return Annotation()
    captions = entry.get("caption_options")
    caption, *rest = map(str, captions) if isinstance(captions, list) and captions else [""]
    image, others = PurePosixPath(path), tuple(rest)
    first, *middle, last = image.stem.split("_")
    if not middle:
        return Annotation(image.name, caption, others=others)
    relation = _FILE_RELATIONS.get("_".join(middle), "")
    names = (first.replace("-", " "), last.replace("-", " "))
    return Annotation(image.name, caption, *names, relation, others)


def _parse_photo(entry: Any, source: Source) -> Annotation:
    if not isinstance(entry, list) or len(entry) < 2 or isinstance(entry[0], bool):
        return Annotation()
    number, caption, others = entry[0], str(entry[1]), tuple(map(str, entry[2:]))
    if not str(number).isdigit():
        return Annotation(caption=caption, others=others)
    image = f"{int(number):012d}.jpg" if source.images == "val2017" else f"{number}.jpg"
    return Annotation(image, caption, others=others)


def _caption_relations(caption: str, parsed: ParsedQuestion) -> set[str]:
    """What the relation words of a caption mean, those in its objects' names left out."""
    rest = caption.casefold()
    for name in (parsed.subject, parsed.object):
        rest = rest.replace(name.casefold(), " ") if name else rest
    return {_meaning(word) for word in re.findall(r"\w+", rest) if word in _CAPTION_RELATIONS}


def _meaning(relation: str) -> str:
    return _MEAN_THE_SAME.get(relation.casefold(), relation.casefold())
