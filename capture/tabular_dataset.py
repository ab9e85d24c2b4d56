"""Any table of (image, question, options, answer): JSON lines, Parquet, Hugging Face directories, folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError

from .dataset import ImageSource, Sample, Scalar
from .dataset_problems import Problem
from .question_text import (
    ParsedQuestion,
    listed,
    order_of_mention,
    parse_question,
    show_options,
    shuffled,
    without_markup,
)
from .sample_list import SampleList, first_rows, mark_problems
from .table_columns import FIELDS, choose_columns, read_coordinates
from .table_files import Table
from .table_folders import open_table


class TabularDataset(SampleList):
    """Samples of a table whose images may lie in the table itself: they are read one by one."""

    def __init__(
        self,
        name: str,
        samples: Sequence[Sample],
        *,
        table: Table,
        images: str | None,
        folder: Path,
        rows: Sequence[int],
        **rest: Any,
    ) -> None:
        super().__init__(name, samples, files=table.files, **rest)
        self._table, self._images, self._folder, self._rows = table, images, folder, tuple(rows)

    def __getitem__(self, index: int, /) -> Sample:
        sample = super().__getitem__(index)
        if self._images is None:
            return sample
        row = self._rows[index]
        return replace(sample, images=_sources(self._table.cell(self._images, row), self._folder, row))

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))


def open_tabular(
    path: str | Path,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    text_only: bool = False,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    answer_is: str = "text",
    data_root: str | Path | None = None,
) -> TabularDataset:
    """Open a table: a file, a folder with one, or a Hugging Face dataset on disk.

    Columns are found by name (`table_columns.FIELDS`): image or images (paths relative to the file's folder,
    or the bytes), question, options or choices (a list), answer, sample_id, relation, subject, object, group.
    All others become coordinates of the samples, of one type each: text, whole numbers, numbers or true /
    false. Options are put in an order of each row's own; a question that lists them is rewritten in this
    order and kept as it was in the column `published_question`, and one that names them in another way gives
    the order instead. Chat markup (`<image>`, `USER:`) around a question is left out. A table without columns
    for options, subject or object gets those of "Where is the S in relation to the O? Answer with a, b or c."

    Rows that are not as they should be are kept and named in `problems` and in the column `problem`: an
    answer that is not an option leaves the sample unscored, and a row that names no image fails when it is
    captured. Only a row without a question is left out.

    Parameters
    ----------
    split
        Of a dataset that has several.
    columns
        Other names, such as {"question": "prompt", "image": "photo"}.
    answer_is
        "text": the answer is an option; "index": its number among them, from 0.
    text_only
        Ask the questions without images.
    data_root
        The folder that image paths are relative to; absent, the table's own.

    Raises
    ------
    DatasetError    nothing readable is there, a column is missing, or there are fewer rows than asked for.
    """
    path = Path(path)
    if answer_is not in ("text", "index"):
        raise DatasetError(f"answer_is={answer_is!r} is neither.", "Use answer_is='text' or 'index'.")
    table = open_table(path, split)
    name = path.stem if path.is_file() else path.resolve().name
    fields, extras = choose_columns(table, columns, f"'{path}'")
    images = None if text_only else _image_column(fields, table, path)
    coordinates, problems = read_coordinates(table, extras)
    texts = {field: table.column(column) for field, column in fields.items() if field != "images"}
    reader = _Reader(texts, coordinates, Order(seed, shuffle, answer_is), problems)
    reader.check_answers(f"'{path}'")
    rows, samples = reader.samples(first_rows(name, len(table), num_samples))
    if images is not None and not table.is_binary(images):
        problems += _without_image(table.column(images), rows)
    return TabularDataset(
        name,
        mark_problems(samples, rows, problems),
        table=table,
        images=images,
        folder=table.folder if data_root is None else Path(data_root),
        rows=rows,
        problems=problems,
        settings={
            "seed": seed,
            "shuffle": shuffle,
            "text_only": text_only,
            "columns": dict(columns or {}),
            "answer_is": answer_is,
        },
    )


def _image_column(fields: Mapping[str, str], table: Table, path: Path) -> str:
    if "images" not in fields:
        raise DatasetError(
            f"'{path}' has no column with images; it has {', '.join(table.columns)}.",
            f"Call it {' or '.join(FIELDS['images'])}, or say --columns image=COLUMN (columns={{'image': "
            "'COLUMN'}); --text-only (text_only=True) asks without.",
        )
    return fields["images"]


@dataclass(frozen=True)
class Order:
    """How options come to be in an order, and how answers name them."""

    seed: int
    shuffle: bool
    answer_is: str


class _Reader:
    """Turns rows into samples without images, and notes what is wrong with them."""

    def __init__(
        self,
        texts: Mapping[str, list[Any]],
        coordinates: Mapping[str, list[Scalar]],
        order: Order,
        problems: list[Problem],
    ) -> None:
        self.texts, self.coordinates, self.order, self.problems = texts, coordinates, order, problems
        self._ids: set[str] = set()

    def check_answers(self, where: str) -> None:
        """Refuse answers that are numbers of options but were not said to be."""
        answers, options = self.texts.get("answer", []), self.texts.get("options", [])
        pairs = [
            (answer, offered)
            for answer, offered in zip(answers, options, strict=False)
            if answer is not None and isinstance(offered, list | tuple)
        ]
        numbers = [isinstance(a, int) and 0 <= a < len(o) and str(a) not in map(str, o) for a, o in pairs]
        if self.order.answer_is == "text" and numbers and all(numbers):
            raise DatasetError(
                f"{where}: the answers are numbers that are not among the options.",
                "If they count the options from 0, say --answer-is index, or answer_is='index'.",
            )

    def samples(self, count: int) -> tuple[list[int], list[Sample]]:
        """The first rows that have a question: which they are, and what they ask."""
        kept = [(row, sample) for row in range(count) if (sample := self.sample(row)) is not None]
        return [row for row, _ in kept], [sample for _, sample in kept]

    def sample(self, row: int) -> Sample | None:
        """A row as a sample; None, noted, where it asks nothing."""
        published = self._text("question", row)
        if not published.strip():
            self._note(row, "no question", "there is no question")
            return None
        parsed = parse_question(published)
        options, answer = self._options(row, parsed)
        question = without_markup(published)
        if self.order.shuffle and len(options) > 1:
            wanted = shuffled(options, seed=self.order.seed, key=str(row))
            rewritten = show_options(question, wanted)
            options = wanted if rewritten else order_of_mention(question, options) or wanted
            question = rewritten or question
        return Sample(
            sample_id=self._sample_id(row),
            images=(),
            question=question,
            options=options,
            answer=answer,
            relation=self._text("relation", row),
            subject=self._text("subject", row) if "subject" in self.texts or not parsed else parsed.subject,
            object=self._text("object", row) if "object" in self.texts or not parsed else parsed.object,
            group=self._text("group", row),
            extra={
                "row": row,
                "published_question": published,
                **{name: values[row] for name, values in self.coordinates.items()},
            },
        )

    def _options(self, row: int, parsed: ParsedQuestion | None) -> tuple[tuple[str, ...], str | None]:
        given = self._value("options", row)
        if "options" not in self.texts and parsed is not None:
            given = parsed.options
        if given is not None and not isinstance(given, list | tuple):
            self._note(row, "options", f"expected a list, found {given!r}; asked for a free answer")
            given = None
        # Tables pad lists of unequal length with nothing.
        texts = [str(option).strip() for option in given or [] if option is not None and str(option).strip()]
        options = tuple(dict.fromkeys(texts))
        if len(options) < len(texts):
            self._note(row, "options", f"an option stands there twice; asked with {listed(options)}")
        answer = self._value("answer", row)
        if answer is None or not options:
            return options, None if answer is None else str(answer).strip()
        if self.order.answer_is == "index":
            inside = isinstance(answer, int) and 0 <= answer < len(given or [])
            found = [str((given or [])[answer]).strip()] if inside else []
        else:
            said = str(answer).strip()
            found = [o for o in options if o == said] or [
                o for o in options if o.casefold() == said.casefold()
            ]
        if len(found) != 1 or found[0] not in options:
            self._note(row, "answer", f"the answer {answer!r} is not among {listed(options)}")
            return options, None
        return options, found[0]

    def _sample_id(self, row: int) -> str:
        wanted = self._text("sample_id", row) or f"row-{row:05d}"
        if wanted in self._ids:
            self._note(row, "id", f"the id {wanted!r} is there twice; this one is called {wanted}-row-{row}")
            wanted = f"{wanted}-row-{row}"
        self._ids.add(wanted)
        return wanted

    def _text(self, field: str, row: int) -> str:
        value = self._value(field, row)
        return "" if value is None else str(value)

    def _value(self, field: str, row: int) -> Any:
        return self.texts[field][row] if field in self.texts else None

    def _note(self, row: int, kind: str, what: str) -> None:
        self.problems.append(Problem(row, kind, what))


def _without_image(values: Sequence[Any], rows: Sequence[int]) -> list[Problem]:
    return [Problem(row, "image", "the row names no image") for row in rows if not values[row]]


def _sources(value: Any, folder: Path, row: int) -> tuple[ImageSource, ...]:
    """The images of one cell: a path, bytes, {"bytes", "path"} as `datasets` has it, or a list of these."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        values = [None]
    return tuple(_source(each, folder, row) for each in values)


def _source(value: Any, folder: Path, row: int) -> ImageSource:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    # Without an image: a path that cannot exist, so that the sample fails and is never asked blindly.
    return folder / str(value) if value else folder / f"(no image is named in row {row})"
