"""Columns of a table of questions: which ones make a sample, and which travel along as its coordinates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mechanistic.store.errors import DatasetError
from mechanistic.store.schema import sample_columns

from .dataset import Scalar
from .dataset_problems import Problem
from .table_files import Table

# The parts of a sample, and the column names that are understood for each, the first that exists.
FIELDS: dict[str, tuple[str, ...]] = {
    "sample_id": ("sample_id", "id"),
    "images": ("images", "image", "image_path", "file_name"),
    "question": ("question",),
    "options": ("options", "choices"),
    "answer": ("answer",),
    "relation": ("relation",),
    "subject": ("subject",),
    "object": ("object",),
    "group": ("group",),
}
# Names that the run's samples table has for itself.
RESERVED = {column.name for column in sample_columns(1)} | {
    "sample",
    "option",
    "option_note",
    "row",
    "problem",
    "published_question",
}
_LARGEST = 2**63


def choose_columns(
    table: Table, columns: Mapping[str, str] | None, where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Part of a sample -> column, and coordinate -> column for all the others.

    Parameters
    ----------
    columns
        Names that differ from `FIELDS`, such as {"question": "prompt"}; another name on the left renames a
        coordinate.

    Raises
    ------
    DatasetError    a column does not exist, there is no question, or a coordinate's name is the run's own.
    """
    given = {("images" if name == "image" else name): column for name, column in (columns or {}).items()}
    absent = [column for column in given.values() if column not in table.columns]
    if absent:
        raise DatasetError(
            f"{where} has no column {absent[0]!r}; it has {', '.join(table.columns)}.",
            "Name columns that exist: --columns question=COLUMN, or columns={'question': 'COLUMN'}.",
        )
    fields = {field: column for field, column in given.items() if field in FIELDS}
    for field, names in FIELDS.items():
        if field not in fields:
            found = next((n for n in names if n in table.columns and n not in given.values()), None)
            fields |= {field: found} if found is not None else {}
    if "question" not in fields:
        raise DatasetError(
            f"{where} has no column 'question'; it has {', '.join(table.columns) or 'none'}.",
            "Say which one it is: --columns question=COLUMN, or columns={'question': 'COLUMN'}.",
        )
    renamed = {column: name for name, column in given.items() if name not in FIELDS}
    extras = {renamed.get(name, name): name for name in table.columns if name not in fields.values()}
    taken = sorted(extras.keys() & RESERVED)
    if taken:
        raise DatasetError(
            f"{where} has a column '{taken[0]}', which is a run's own name.",
            f"Give it another: --columns their_{taken[0]}={extras[taken[0]]}, "
            f"or columns={{'their_{taken[0]}': '{extras[taken[0]]}'}}.",
        )
    return fields, extras


def read_coordinates(
    table: Table, extras: Mapping[str, str]
) -> tuple[dict[str, list[Scalar]], list[Problem]]:
    """Each coordinate as one type (text, whole numbers, numbers, true / false), and what that changed."""
    columns: dict[str, list[Scalar]] = {}
    problems = []
    for name, column in extras.items():
        if table.is_binary(column):
            problems.append(Problem(-1, "column", f"column '{column}' holds files and is left out"))
            continue
        values, changed = one_type(table.column(column))
        columns[name] = values
        if changed:
            problems.append(Problem(-1, "column", f"column '{column}' {changed}"))
    return columns, problems


def one_type(values: Sequence[Any]) -> tuple[list[Scalar], str]:
    """The values as one of the four types, and what was changed, "" for nothing.

    Missing numbers become NaN (whole numbers and true / false then become numbers), missing text "". Lists,
    objects, dates and mixtures become text.
    """
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    missing = len(present) < len(values)
    if kinds <= {str}:
        return ["" if value is None else str(value) for value in values], ""
    if kinds == {bool} and not missing:
        return list(values), ""
    if kinds == {bool}:
        return [
            math.nan if value is None else float(value) for value in values
        ], "lacks values: now 0, 1 and NaN"
    if kinds <= {int, float} and all(isinstance(v, float) or -_LARGEST <= v < _LARGEST for v in present):
        if kinds == {int} and not missing:
            return list(values), ""
        changed = "lacks values: now numbers and NaN" if kinds == {int} else ""
        return [math.nan if value is None else float(value) for value in values], changed
    held = ", ".join(sorted(kind.__name__ for kind in kinds))
    return [_as_text(value) for value in values], f"holds {held}: now text"


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError):
        return str(value)
