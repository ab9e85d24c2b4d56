"""Which files a path means: one table, a folder with one, or a split of a Hugging Face dataset on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError

from .table_files import JSON_LINES, SUFFIXES, ArrowTable, JsonTable, Table, read_class_names

# train-00000-of-00002-0123456789abcdef.parquet, squad-train.arrow, test.parquet
_NUMBERED = re.compile(r"(?P<name>.+?)-\d+-of-\d+(?:-\w+)?")
_NOT_TABLES = {"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json"}


def open_table(path: Path, split: str | None = None) -> Table:
    """Open the table that a path means.

    A folder is a Hugging Face `save_to_disk` directory, a folder (or cache) of Parquet or Arrow files whose
    names tell the split, or one that holds one .jsonl or .json file.

    Raises
    ------
    DatasetError    nothing readable is there, or there are several splits and none was named.
    """
    if not path.exists():
        raise DatasetError(f"There is no file or folder '{path}'.", "Check the path.")
    if path.is_dir():
        return _open_folder(path, split)
    if split is not None:
        raise DatasetError(
            f"'{path}' is one file and has no splits; '{split}' was asked for.", "Leave split out."
        )
    if path.suffix not in SUFFIXES:
        raise DatasetError(
            f"'{path}' is not a table that can be read (its name ends in {path.suffix!r}).",
            f"Use {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or a folder that holds one.",
        )
    if path.suffix in (*JSON_LINES, ".json"):
        return JsonTable(path)
    return ArrowTable([path], path.parent, read_class_names(path.parent))


def _open_folder(path: Path, split: str | None) -> Table:
    if (path / "dataset_dict.json").exists():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        return _open_saved(path / _chosen(splits, split, path))
    if (path / "state.json").exists():
        if split is not None:
            raise DatasetError(f"'{path}' is one split and was asked for {split!r}.", "Leave split out.")
        return _open_saved(path)
    binary = sorted(each for each in path.rglob("*") if _is_binary_table(each, path))
    if binary:
        parts: dict[str, list[Path]] = {}
        for file in binary:
            parts.setdefault(_split_of(file, path), []).append(file)
        chosen = parts[_chosen(list(parts), split, path)]
        return ArrowTable(chosen, path, read_class_names(path))
    return _open_single(path, split)


def _open_saved(folder: Path) -> Table:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DatasetError(
            f"'{folder}' holds a selection of rows beside the rows.",
            "Save it flat: dataset.flatten_indices().save_to_disk(FOLDER).",
        )
    names = [entry.get("filename") for entry in state.get("_data_files", [])]
    missing = [name for name in names if not (folder / str(name)).exists()]
    if missing or not names:
        lacking = ", ".join(map(str, missing)) or "its data files"
        raise DatasetError(
            f"'{folder}' lacks {lacking}, which its state.json names.",
            "The copy is incomplete: save_to_disk again, or copy the folder whole.",
        )
    return ArrowTable([folder / name for name in names], folder, read_class_names(folder))


def _open_single(path: Path, split: str | None) -> Table:
    tables = [
        each
        for each in sorted(path.iterdir())
        if each.suffix in (*JSON_LINES, ".json") and each.name not in _NOT_TABLES
    ]
    if split is not None:
        tables = [each for each in tables if each.stem == split]
    if len(tables) != 1:
        held = ", ".join(each.name for each in tables) or "no table of questions"
        raise DatasetError(
            f"'{path}' holds {held}{f' for split {split!r}' if split and not tables else ''}.",
            "A folder needs one .jsonl or .json file, or Parquet or Arrow files, with image, question, "
            "options and answer. Where there are several, name the file.",
        )
    return JsonTable(tables[0])


def _is_binary_table(file: Path, root: Path) -> bool:
    """A Parquet or Arrow file that is neither hidden nor the result of a cached `map`."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix in (".parquet", ".arrow") and not hidden and not file.name.startswith("cache-")


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name tells, or its folder's if the name is a number."""
    numbered = _NUMBERED.fullmatch(file.stem)
    name = numbered["name"] if numbered else file.stem
    folders = file.relative_to(root).parts[:-1]
    if name.isdigit() and folders:
        return "/".join(folders)
    kept = [folder for folder in folders if folder != "data"]
    # Caches put the name of the data set before the split.
    return "/".join([*kept, name.rsplit("-", 1)[-1] if file.suffix == ".arrow" else name])


def _chosen(splits: Sequence[str], split: str | None, path: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits:
        return str(split)
    if not splits:
        raise DatasetError(f"'{path}' has no splits.", "The folder is empty: save the dataset again.")
    wanted = "none was named" if split is None else f"not {split!r}"
    raise DatasetError(
        f"'{path}' has the splits {', '.join(splits)}; {wanted}.",
        f"Choose one: --split {splits[-1]}, or split={splits[-1]!r}.",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"'{path}' cannot be read ({error}).", "Save the dataset again.") from error
    return content if isinstance(content, dict) else {}
