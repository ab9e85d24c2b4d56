"""Visual Spatial Reasoning (VSR): captions of photos, true or false, and questions made of the true ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mechanistic.store.errors import DatasetError

from .annotation_files import first_existing, read_json_lines
from .dataset import Sample
from .dataset_problems import Problem
from .question_text import listed, mentions, parse_question, shuffled, strip_markup
from .sample_list import SampleList, first_rows, mark_problems

QUESTIONS = "VSR_with_answer.jsonl"
TASKS = ("statement", "question")
WHERE_FROM = (
    "captions: data/splits/zeroshot of github.com/cambridgeltl/visual-spatial-reasoning; images: COCO 2017"
)
_FOLDERS = ("", "data", "zeroshot", "splits/zeroshot", "data/splits/zeroshot", "vsr", "VSR")
_IMAGE_FOLDERS = ("images", "trainval2017", "vsr_images")

_BE = re.compile(
    r"The (?P<subject>.+?) (?:is|are) (?P<relation>.+) (?:the|an?) (?P<object>.+?)\.?", re.IGNORECASE
)
_HAVE = re.compile(
    r"The (?P<subject>.+?) (?P<relation>contains?|consists? of|ha(?:s|ve) as a part|surrounds?|touch(?:es)?)"
    r" (?:the|an?) (?P<object>.+?)\.?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Caption:
    """One row of the published file, its parts checked against the caption itself."""

    text: str
    label: bool | None
    image: str
    subject: str
    relation: str
    object: str


def open_vsr(
    data_root: str | Path | None = None,
    *,
    split: str = "test",
    task: str = "statement",
    num_samples: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    text_only: bool = False,
) -> SampleList:
    """Open VSR.

    Task "statement" asks whether each caption is true or false, the two in an order of each row's own. Task
    "question" asks "Where is the S in relation to the O?" for a free answer, from a question file whose ids
    are rows of the captions' file. `group` is the image. Subject, relation and object are the file's own
    columns where the caption has them as words, else read from the caption. Rows that are not as they should
    be are kept and named in `problems` and in the column `problem`. Further columns: row, image_name,
    caption, published_question.

    Parameters
    ----------
    data_root
        The folder with the captions (SPLIT.jsonl) and the images, in train2017/ and val2017/ or in images/.
    split
        Which file of captions; the question file belongs to "test" of the zero-shot split.

    Raises
    ------
    DatasetError    files are missing, damaged or not each other's, or there are fewer rows than asked for.
    """
    if task not in TASKS:
        raise DatasetError(f"VSR has no task {task!r}.", f"The tasks are {' and '.join(TASKS)}.")
    files = _find(data_root, split, task)
    reader = _Reader(files, seed, shuffle, text_only)
    asked = read_json_lines(files.questions) if files.questions else reader.captions
    count = first_rows(f"VSR ({task})", len(asked), num_samples)
    make = reader.question if files.questions else reader.statement
    samples = [make(row, asked[row]) for row in range(count)]
    settings = {"split": split, "task": task, "seed": seed, "shuffle": shuffle, "text_only": text_only}
    used = [path for path in (files.captions, files.questions) if path is not None]
    samples = mark_problems(samples, [int(sample.extra["row"]) for sample in samples], reader.problems)
    return SampleList("VSR", samples, problems=reader.problems, files=used, settings=settings)


@dataclass(frozen=True)
class Files:
    """The files of one task; `questions` is None for statements. Images are looked for under `root`."""

    root: Path
    captions: Path
    questions: Path | None


class _Reader:
    """Turns rows into samples and notes what is wrong with them."""

    def __init__(self, files: Files, seed: int, shuffle: bool, text_only: bool) -> None:
        self.files, self.seed, self.shuffle = files, seed, shuffle
        self.captions = read_json_lines(files.captions)
        self.problems: list[Problem] = []
        if self.captions and not isinstance(self.captions[0].get("caption"), str):
            raise DatasetError(
                f"'{files.captions}' is not a file of VSR: its rows have no caption.",
                f"Expected rows with image_link, caption and label ({WHERE_FROM}).",
            )
        self.folders = None if text_only else _image_folders(files, self.captions)

    def statement(self, row: int, entry: dict[str, Any]) -> Sample:
        caption = self._caption(row, entry)
        options: tuple[str, ...] = ("true", "false")
        if self.shuffle:
            options = shuffled(options, seed=self.seed, key=str(row))
        text = f'Consider this statement about the image: "{caption.text}" Answer with {listed(options)}.'
        answer = None if caption.label is None else "true" if caption.label else "false"
        return self._sample(row, caption, text, options, answer, "")

    def question(self, number: int, entry: dict[str, Any]) -> Sample:
        row, published = entry.get("id"), entry.get("question")
        if not isinstance(row, int) or not 0 <= row < len(self.captions) or not isinstance(published, str):
            raise DatasetError(
                f"'{self.files.questions}', row {number}: it has no question, or its id {row!r} is no row of "
                f"'{self.files.captions}', which has {len(self.captions)}.",
                "The question file belongs to test.jsonl of the zero-shot split, in its published order.",
            )
        caption = self._caption(row, self.captions[row])
        parsed = parse_question(published)
        given = entry.get("answer")
        answer = (given[0] if isinstance(given, list) and given else given) or None
        if parsed is None:
            self._note(row, "wording", f"not of the form 'Where is the ...': {published!r}")
        else:
            missing = [name for name in (parsed.subject, parsed.object) if not mentions(caption.text, name)]
            if missing:
                self._note(row, "names", f"asks about {listed(missing)}, the caption is {caption.text!r}")
        if answer is None or caption.label is not True or not mentions(caption.text, str(answer)):
            what = f"the answer is {answer!r}, the caption {caption.text!r} is {str(caption.label).lower()}"
            self._note(row, "answer", what)
        text = parsed.text() if parsed else strip_markup(published)
        if parsed is not None:
            # The words of the question itself, so that its tokens can be told by them.
            caption = replace(caption, subject=parsed.subject, object=parsed.object)
        return self._sample(row, caption, text, (), None if answer is None else str(answer), published)

    def _sample(
        self,
        row: int,
        caption: Caption,
        question: str,
        options: tuple[str, ...],
        answer: str | None,
        published: str,
    ) -> Sample:
        return Sample(
            sample_id=f"VSR-{row:05d}",
            images=self._images(row, caption),
            question=question,
            options=options,
            answer=answer,
            relation=caption.relation,
            subject=caption.subject,
            object=caption.object,
            group=f"VSR-{PurePosixPath(caption.image).name}" if caption.image else "",
            extra={
                "row": row,
                "image_name": PurePosixPath(caption.image).name,
                "caption": caption.text,
                "published_question": published,
            },
        )

    def _caption(self, row: int, entry: dict[str, Any]) -> Caption:
        text = str(entry.get("caption") or "").strip()
        label = entry.get("label")
        if label not in (0, 1):
            self._note(row, "answer", f"the label is {label!r}, expected 0 or 1; unscored")
        image = _link(entry)
        if not image:
            self._note(row, "image", f"row {row} names no image")
        names = {"subject": entry.get("subj"), "relation": entry.get("relation"), "object": entry.get("obj")}
        found = _BE.fullmatch(text) or _HAVE.fullmatch(text)
        for role, name in names.items():
            if isinstance(name, str) and name and mentions(text, name):
                continue
            names[role] = found[role] if found else ""
            if name:
                self._note(row, "names", f"{role} {name!r} is not in {text!r}, used {names[role]!r}")
        if not all(names.values()):
            self._note(row, "wording", f"cannot tell subject, relation and object of {text!r}")
        return Caption(
            text, bool(label) if label in (0, 1) else None, image, **{k: str(v) for k, v in names.items()}
        )

    def _images(self, row: int, caption: Caption) -> tuple[Path, ...]:
        if self.folders is None:
            return ()
        if not caption.image:
            # A path that cannot exist, so that the sample fails at capture and is never asked blindly.
            return (self.files.root / f"(no image is named in row {row})",)
        path = PurePosixPath(caption.image)
        return (self.folders[path.parent.name] / path.name,)

    def _note(self, row: int, kind: str, what: str) -> None:
        problem = Problem(row, kind, what)
        if problem not in self.problems:
            self.problems.append(problem)


def _link(entry: dict[str, Any]) -> str:
    """`train2017/000000085637.jpg`, from the link to it, or the bare file name where there is no link."""
    link = entry.get("image_link") or entry.get("image")
    parts = link.split("/") if isinstance(link, str) else []
    return "/".join([part for part in parts if part not in ("", ".", "..")][-2:])


def _image_folders(files: Files, captions: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Where the images of each folder in the links lie."""
    wanted = sorted({PurePosixPath(_link(entry)).parent.name for entry in captions if _link(entry)})
    places = (files.root, files.root / "data", files.captions.parent)
    found = {}
    for name in wanted:
        folders = ([place / name for place in places] if name else []) + [
            place / other for other in _IMAGE_FOLDERS for place in places
        ]
        existing = next((folder for folder in folders if folder.is_dir()), None)
        if existing is None:
            raise DatasetError(
                f"VSR: '{files.root}' lacks the images, in {name or 'images'}/ or images/.",
                f"Put {' and '.join(f'{each}/' for each in wanted if each)} there ({WHERE_FROM}). "
                "--text-only (text_only=True) asks without images.",
            )
        found[name] = existing
    return found


def _find(data_root: str | Path | None, split: str, task: str) -> Files:
    name = f"{split}.jsonl"
    needed = [name, *([QUESTIONS] if task == "question" else []), "train2017/", "val2017/"]
    if data_root is None:
        raise DatasetError(
            "VSR is read from a folder of your own, and none was given.",
            f"Give --data-root FOLDER with {', '.join(needed)} in it ({WHERE_FROM}).",
        )
    root = Path(data_root)
    captions = first_existing([root / folder for folder in _FOLDERS], name)
    questions = None
    if task == "question":
        questions = first_existing((root, root / "prompts", root.parent / "prompts"), QUESTIONS)
    missing = [] if captions else [f"{name} (image_link, caption and label of each row)"]
    if task == "question" and questions is None:
        missing.append(f"{QUESTIONS} (the questions: prompts/ of github.com/shiqichen17/AdaptVis)")
    if captions is None or missing:
        raise DatasetError(
            f"VSR: '{root}' lacks {' and '.join(missing)}.",
            f"Put {', '.join(needed)} there ({WHERE_FROM}).",
        )
    return Files(root, captions, questions)
