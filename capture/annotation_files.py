"""The JSON and JSON-lines files that datasets are published in: found, read whole, and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line; blank lines are skipped.

    Raises
    ------
    DatasetError    the file is unreadable, or a line is not a JSON object (a download that stopped half way).
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, path, f"line {number}")
        if not isinstance(row, dict):
            raise DatasetError(
                f"'{path}', line {number}: expected a JSON object, found a {type(row).__name__}.",
                'Write one object a line: {"image": "a.png", "question": "...", "answer": "..."}.',
            )
        rows.append(row)
    return rows


def read_json_list(path: Path) -> list[Any]:
    """A file that is one JSON list.

    Raises
    ------
    DatasetError    the file is unreadable, not JSON, or not a list.
    """
    content = _parse(_read_text(path), path, "the file")
    if not isinstance(content, list):
        raise DatasetError(
            f"'{path}': expected a JSON list of rows, found a {type(content).__name__}.",
            "Give the published file as it is, or one object a line in a .jsonl file.",
        )
    return content


def first_existing(folders: Iterable[Path], name: str) -> Path | None:
    """The first of `folder / name` that exists."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"'{path}' is not UTF-8 text (byte {error.start}).", "Convert it: iconv -t utf-8 FILE."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"'{path}' cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error


def _parse(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"'{path}', {where}: not JSON ({error.msg} at character {error.pos}).",
            "The file is damaged or cut short: download it again, or mend that line.",
        ) from error
