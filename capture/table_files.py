"""Tables of questions in files: JSON lines, a JSON list, Parquet, Arrow; images are read one by one."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mechanistic.store.errors import DatasetError

from .annotation_files import read_json_lines, read_json_list

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_LINES, ".json", ".parquet", ".arrow")


class Table(Protocol):
    """Rows with named columns; paths in it are relative to `folder`, and `files` decide its content."""

    @property
    def folder(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """All values of a column, None where a row has none."""
        ...

    def cell(self, name: str, row: int) -> Any:
        """One value, read when it is asked for."""
        ...

    def is_binary(self, name: str) -> bool:
        """Whether a column holds the bytes of files, which are not to be read all at once."""
        ...


class JsonTable:
    """A list of JSON objects; they need not have the same keys."""

    def __init__(self, path: Path) -> None:
        self.folder, self.files = path.parent, (path,)
        rows = read_json_lines(path) if path.suffix in JSON_LINES else read_json_list(path)
        odd = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
        if odd is not None:
            raise DatasetError(
                f"'{path}', row {odd}: expected an object, found a {type(rows[odd]).__name__}.",
                'Rows are objects such as {"image": "a.png", "question": "...", "answer": "..."}.',
            )
        self._rows: list[dict[str, Any]] = rows

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._rows]

    def cell(self, name: str, row: int) -> Any:
        return self._rows[row].get(name)

    def is_binary(self, name: str) -> bool:
        return False


class ArrowTable:
    """Parquet or Arrow files end to end; a row's image is read, with its row group, when it is asked for."""

    def __init__(self, files: Sequence[Path], folder: Path, classes: Mapping[str, Sequence[str]]) -> None:
        self.folder, self.files = folder, tuple(files)
        self._parts = [_open_part(path) for path in self.files]
        self._classes = {**_classes_of(self._parts[0].schema), **classes}
        self._check_schemas()
        self._cached: tuple[tuple[str, int, int], Any] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._parts[0].schema.names)

    def __len__(self) -> int:
        return sum(sum(part.groups) for part in self._parts)

    def column(self, name: str) -> list[Any]:
        values = [
            value
            for part in self._parts
            for group in range(len(part.groups))
            for value in part.read(group, name).to_pylist()
        ]
        names = self._classes.get(name)
        if names is None:
            return values
        return [
            names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values
        ]

    def cell(self, name: str, row: int) -> Any:
        start = row
        for number, part in enumerate(self._parts):
            for group, rows in enumerate(part.groups):
                if start < rows:
                    return self._group(name, number, group)[start].as_py()
                start -= rows
        raise IndexError(f"row {row} of {len(self)}")

    def is_binary(self, name: str) -> bool:
        kind = str(self._parts[0].schema.field(name).type)
        return re.search(r"\b(?:large_)?binary\b", kind) is not None

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to other processes.
        return {"files": self.files, "folder": self.folder, "classes": self._classes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"], state["folder"], state["classes"])  # type: ignore[misc]

    def _group(self, name: str, part: int, group: int) -> Any:
        key = (name, part, group)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._parts[part].read(group, name))
        return self._cached[1]

    def _check_schemas(self) -> None:
        for path, part in zip(self.files, self._parts, strict=True):
            if part.schema.names != self._parts[0].schema.names:
                raise DatasetError(
                    f"'{path}' has the columns {', '.join(part.schema.names)}, "
                    f"'{self.files[0].name}' {', '.join(self.columns)}.",
                    "Files of one split have the same columns: name one file, or a folder of one data set.",
                )


class _ParquetPart:
    def __init__(self, path: Path) -> None:
        self._file = pyarrow("pyarrow.parquet").ParquetFile(path)
        self.schema = self._file.schema_arrow
        self.groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]

    def read(self, group: int, name: str) -> Any:
        return self._file.read_row_group(group, columns=[name]).column(name)


class _ArrowPart:
    """A memory-mapped Arrow file in the stream format that `datasets` writes, or in the file format."""

    def __init__(self, path: Path) -> None:
        ipc, arrow = pyarrow("pyarrow.ipc"), pyarrow("pyarrow")
        with path.open("rb") as file:
            indexed = file.read(6) == b"ARROW1"
        mapped = arrow.memory_map(str(path))
        table = (ipc.open_file(mapped) if indexed else ipc.open_stream(mapped)).read_all()
        self.schema = table.schema
        self._batches = table.to_batches()
        self.groups = [batch.num_rows for batch in self._batches]

    def read(self, group: int, name: str) -> Any:
        return self._batches[group].column(name)


def pyarrow(module: str) -> Any:
    """pyarrow, which only Parquet and Arrow files need.

    Raises
    ------
    DatasetError    it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DatasetError(
            "Parquet and Arrow files are read with pyarrow, which is not installed.",
            'Type: pip install "mechanistic[capture]" (or pip install pyarrow).',
        ) from error


def read_class_names(folder: Path) -> dict[str, list[str]]:
    """The class names that `dataset_info.json` gives to columns of numbers; none without that file."""
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _class_names(info.get("features") if isinstance(info, dict) else None)


def _open_part(path: Path) -> Any:
    arrow = pyarrow("pyarrow")
    try:
        return _ParquetPart(path) if path.suffix == ".parquet" else _ArrowPart(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise DatasetError(
            f"'{path}' is not a whole {path.suffix[1:].capitalize()} file ({str(error).splitlines()[0]}).",
            "The file is damaged or cut short, or a Git LFS pointer: download it again.",
        ) from error


def _classes_of(schema: Any) -> dict[str, list[str]]:
    stored = (schema.metadata or {}).get(b"huggingface")
    return _class_names(json.loads(stored).get("info", {}).get("features")) if stored else {}


def _class_names(features: Any) -> dict[str, list[str]]:
    if not isinstance(features, dict):
        return {}
    return {
        name: [str(each) for each in feature["names"]]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
