"""The options of a command line that say how the questions of a dataset are read."""

from __future__ import annotations

import argparse
from typing import Any


def add_question_options(group: argparse._ArgumentGroup) -> None:
    """What says how the questions of a dataset are read."""
    group.add_argument("--text-only", action="store_true", help="ask the questions without images")
    group.add_argument("--split", metavar="NAME", help="of a dataset that has several, such as test")
    group.add_argument(
        "--task",
        metavar="NAME",
        help="of VSR, how its statements are asked: statement, question; of What'sUp: question, caption",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        type=_column,
        metavar="FIELD=COLUMN",
        help="columns of a table that have other names, such as question=prompt image=photo",
    )
    group.add_argument(
        "--answer-is", choices=("text", "index"), help="answers of a table: an option, or its number from 0"
    )


def question_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of these, what was given, as `open_dataset` takes it."""
    given = {name: getattr(args, name) for name in ("text_only", "split", "task", "answer_is")}
    given["columns"] = dict(args.columns or ())
    return {name: value for name, value in given.items() if value}


def _column(text: str) -> tuple[str, str]:
    field, separator, column = text.partition("=")
    if not (field and separator and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=COLUMN, such as question=prompt")
    return field, column
