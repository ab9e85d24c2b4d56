"""What'sUp (Controlled_Images_A and _B) and its COCO and VG subsets, from question and annotation files.

Row i of the question file belongs to row i of the annotation file. The questions are asked in one layout,
"Where is the S in relation to the O? Answer with a, b, c or d.", without chat markup (every model gets its
own) and with the options in a shuffled order; the published text is kept in the column `published_question`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError

from .annotation_files import first_existing, read_json_lines
from .dataset import Sample
from .dataset_problems import Problem
from .question_text import ParsedQuestion, listed, parse_question, shuffled, strip_markup
from .sample_list import SampleList, first_rows, mark_problems
from .whatsup_annotations import SOURCES, Annotation, Source, read_annotations, wrong_names, wrong_relation

WHERE_FROM = (
    "questions: prompts/ of github.com/shiqichen17/AdaptVis; the rest: github.com/amitakamath/whatsup_vlms"
)

TASKS = ("question", "caption")


@dataclass(frozen=True)
class Files:
    """Where the files of one set lie; without images, `images` is None and `annotations` may be."""

    questions: Path
    annotations: Path | None
    images: Path | None


def open_whatsup(
    name: str,
    data_root: str | Path | None = None,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    text_only: bool = False,
    task: str = "question",
) -> SampleList:
    """Open one of the six sets.

    Relation and answer are words of the question's own list of options. In the controlled sets `group` is the
    pair of objects, whose four samples share one order of options: they differ in the image alone, and the
    right option stands at each place once. In the others `group` is the image, and every row has an order of
    its own.

    Rows that are not as they should be are kept and named in `problems` and in the column `problem`: a list
    of options without the answer is replaced by the file's usual one if that has it (else the sample is
    unscored), text after the list is left out, and names, relations and ids that the annotation contradicts
    stay as they are. Only a row without a question is left out. Further columns: row, image_name, caption
    (the right one), published_question.

    Parameters
    ----------
    data_root
        The folder with the files, or one with `data/` and `prompts/` in it; `prompts/` may lie beside it.
    num_samples
        The first rows of the file; absent, all.
    seed
        Of the order of options.
    shuffle
        False keeps the published order.
    text_only
        Ask the questions without images, for a language-prior baseline; needs the question file alone.
    task
        "question", or "caption" for models that compare a text with an image: options are the published
        captions, and the right one of them stands in the place of the question. Relation, group and all
        columns are the same; a row without several captions is left out.

    Raises
    ------
    DatasetError    files are missing, damaged or not each other's, there are fewer rows than asked for, or
                    no such task, or captions without their images.
    """
    if task not in TASKS or (task == "caption" and text_only):
        raise DatasetError(
            f"{name} has no task {task!r}{' without images' if text_only else ''}.",
            f"The tasks are {' and '.join(TASKS)}; a caption is compared with its image.",
        )
    source = SOURCES[name]
    files = _find(source, data_root, text_only)
    questions = read_json_lines(files.questions)
    annotations = read_annotations(source, files.annotations) if files.annotations else None
    if annotations is not None and len(annotations) != len(questions):
        raise DatasetError(
            f"'{files.questions}' has {len(questions)} rows, '{files.annotations}' {len(annotations)}.",
            f"Row i of one belongs to row i of the other: get both for {name}, as published.",
        )
    reader = _Reader(source, files, _usual_options(questions), seed, shuffle)
    made = [
        (row, reader.sample(row, question, annotations[row] if annotations else None, task))
        for row, question in enumerate(questions)
    ]
    _check_together(files, reader.problems, len(questions))
    count = first_rows(name, len(questions), num_samples)
    kept = {row: sample for row, sample in made[:count] if sample is not None}
    problems = [problem for problem in reader.problems if problem.row < count]
    problems += _repeated(kept) if files.images else []
    return SampleList(
        name,
        mark_problems(list(kept.values()), list(kept), problems),
        problems=problems,
        files=[path for path in (files.questions, files.annotations) if path is not None],
        settings={"seed": seed, "shuffle": shuffle, "text_only": text_only}
        | ({"task": task} if task != "question" else {}),
    )


class _Reader:
    """Turns rows into samples and notes what is wrong with them."""

    def __init__(
        self, source: Source, files: Files, usual: tuple[str, ...], seed: int, shuffle: bool
    ) -> None:
        self.source, self.files, self.usual, self.seed, self.shuffle = source, files, usual, seed, shuffle
        self.problems: list[Problem] = []

    def sample(
        self, row: int, question: dict[str, Any], annotation: Annotation | None, task: str
    ) -> Sample | None:
        asked = self._asked(row, question, annotation)
        if asked is None or annotation is None or task == "question":
            return asked
        captions = tuple(dict.fromkeys(each for each in (annotation.caption, *annotation.others) if each))
        if not annotation.caption or len(captions) < 2:
            self._note(
                row, "no captions", f"the annotation has no captions to choose from: {listed(captions)}"
            )
            return None
        if self.shuffle:
            captions = shuffled(captions, seed=self.seed, key=asked.group or str(row))
        right = annotation.caption
        return replace(asked, question=right, options=captions, answer=right)

    def _asked(self, row: int, question: dict[str, Any], annotation: Annotation | None) -> Sample | None:
        published = question.get("question")
        if not isinstance(published, str) or not published.strip():
            self._note(row, "no question", "there is no question")
            return None
        if question.get("id", row) != row:
            self._note(row, "id", f"the row's id is {question['id']!r}")
        parsed = parse_question(published)
        answer = self._answer(row, question.get("answer"))
        if parsed is None:
            self._note(row, "wording", f"not of the form 'Where is the ...': {published!r}")
            options: tuple[str, ...] = ()
        else:
            self._check_layout(row, published, parsed)
            options, answer = self._options(row, parsed, answer)
        group = self._group(annotation, parsed)
        if self.shuffle:
            options = shuffled(options, seed=self.seed, key=group if self.source.controlled else str(row))
        if annotation is not None:
            self._check_annotation(row, annotation, parsed, answer or "")
        return Sample(
            sample_id=f"{self.source.name}-{row:04d}",
            images=self._images(row, annotation),
            question=parsed.text(options) if parsed else strip_markup(published),
            options=options,
            answer=answer,
            relation=answer or "",
            subject=parsed.subject if parsed else "",
            object=parsed.object if parsed else "",
            group=group,
            extra={
                "row": row,
                "image_name": annotation.image if annotation else "",
                "caption": annotation.caption if annotation else "",
                "published_question": published,
            },
        )

    def _answer(self, row: int, published: Any) -> str | None:
        answers = published if isinstance(published, list) else [published]
        if len(answers) != 1 or not isinstance(answers[0], str) or not answers[0].strip():
            self._note(row, "answer", f"expected one answer, found {published!r}")
            return None
        return answers[0].strip().casefold()

    def _options(
        self, row: int, parsed: ParsedQuestion, answer: str | None
    ) -> tuple[tuple[str, ...], str | None]:
        """The options to show, and the answer, None where it is not among them."""
        options = tuple(dict.fromkeys(option.casefold() for option in parsed.options))
        if set(options) == set(self.usual):
            options = self.usual
        elif answer in options or answer is None or answer not in self.usual:
            self._note(
                row, "options", f"offers {listed(options) or 'no options'}, most rows {listed(self.usual)}"
            )
        else:
            instead = f"offers {listed(options) or 'no options'}, not the answer {answer!r}"
            self._note(row, "options", f"{instead}; asked with {listed(self.usual)}")
            options = self.usual
        if options and answer is not None and answer not in options:
            self._note(row, "answer", f"the answer {answer!r} is not among {listed(options)}")
            answer = None
        return options, answer

    def _check_layout(self, row: int, published: str, parsed: ParsedQuestion) -> None:
        if parsed.surplus:
            self._note(row, "surplus text", f"after the options stands {parsed.surplus!r}")
        elif published != f"<image>\nUSER: {parsed.text()}\nASSISTANT:":
            self._note(row, "layout", f"white space or punctuation out of place: {published!r}")

    def _check_annotation(
        self, row: int, annotation: Annotation, parsed: ParsedQuestion | None, answer: str
    ) -> None:
        if not annotation.image:
            self._note(row, "image", f"row {row} of the annotation file names no image")
        elif parsed is not None:
            if wrong := wrong_names(annotation, parsed):
                self._note(row, "names", wrong)
            elif answer and (wrong := wrong_relation(annotation, parsed, answer)):
                self._note(row, "answer", wrong)

    def _images(self, row: int, annotation: Annotation | None) -> tuple[Path, ...]:
        if self.files.images is None:
            return ()
        image = annotation.image if annotation else ""
        # A path that cannot exist, so that the sample fails where it is captured and is never asked blindly.
        return (self.files.images / (image or f"(no image is named in row {row})"),)

    def _group(self, annotation: Annotation | None, parsed: ParsedQuestion | None) -> str:
        if self.source.controlled:
            return f"{self.source.name}-{parsed.subject}_{parsed.object}".replace(" ", "-") if parsed else ""
        return f"{self.source.name}-{annotation.image}" if annotation and annotation.image else ""

    def _note(self, row: int, kind: str, what: str) -> None:
        self.problems.append(Problem(row, kind, what))


def _find(source: Source, data_root: str | Path | None, text_only: bool) -> Files:
    needed = [source.questions] if text_only else [source.questions, source.annotations, f"{source.images}/"]
    if data_root is None:
        raise DatasetError(
            f"{source.name} is read from a folder of your own, and none was given.",
            f"Give --data-root FOLDER with {listed(needed, 'and')} in it ({WHERE_FROM}).",
        )
    root = Path(data_root)
    questions = first_existing((root, root / "prompts", root.parent / "prompts"), source.questions)
    annotations = first_existing((root, root / "data"), source.annotations)
    images = first_existing((root, root / "data"), source.images)
    missing = [] if questions else [f"{source.questions} (the questions)"]
    if not text_only:
        missing += [] if annotations else [f"{source.annotations} (which image each question is about)"]
        missing += [] if images and images.is_dir() else [f"{source.images}/ (the images)"]
    if missing or questions is None:
        blind = "" if questions is None or text_only else " --text-only (text_only=True) asks without images."
        raise DatasetError(
            f"{source.name}: '{root}' lacks {listed(missing, 'and')}.",
            f"Put {listed(needed, 'and')} there ({WHERE_FROM}).{blind}",
        )
    return Files(questions, annotations, None if text_only else images)


def _usual_options(questions: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The list of options that most questions of the file offer."""
    parsed = (parse_question(row["question"]) for row in questions if isinstance(row.get("question"), str))
    offered = Counter(tuple(option.casefold() for option in each.options) for each in parsed if each)
    return offered.most_common(1)[0][0] if offered else ()


def _check_together(files: Files, problems: Sequence[Problem], rows: int) -> None:
    wrong = [problem for problem in problems if problem.kind == "names"]
    if 2 * len(wrong) > rows:
        pair = f"'{files.questions}' and '{files.annotations}'"
        raise DatasetError(
            f"{pair} are about other objects in {len(wrong)} of {rows} rows; {wrong[0]}.",
            "Row i of one belongs to row i of the other: use both files as published, in their own order.",
        )


def _repeated(samples: Mapping[int, Sample]) -> list[Problem]:
    """Questions that are asked twice of one image, with the same answer or with another."""
    first: dict[tuple[Any, ...], tuple[int, str | None]] = {}
    problems = []
    for row, sample in samples.items():
        asked = (sample.images, sample.subject, sample.object)
        if asked not in first:
            first[asked] = (row, sample.answer)
        elif first[asked][1] == sample.answer:
            problems.append(Problem(row, "duplicate", f"asks the same as row {first[asked][0]}"))
        else:
            what = f"answers {sample.answer!r} to what row {first[asked][0]} answers {first[asked][1]!r}"
            problems.append(Problem(row, "contradiction", what))
    return problems
