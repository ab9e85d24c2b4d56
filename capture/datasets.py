"""Datasets by name or path."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mechanistic.store.errors import DatasetError

from .dataset import Dataset
from .shapes import Shapes
from .table_files import SUFFIXES
from .tabular_dataset import open_tabular
from .vsr import QUESTIONS, open_vsr
from .whatsup import open_whatsup
from .whatsup_annotations import SOURCES


def open_dataset(
    name_or_path: str | Path,
    *,
    data_root: str | Path | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Dataset:
    """Open a dataset by its name, or a table of questions by its path.

    Parameters
    ----------
    name_or_path
        One of `dataset_names()`, or a .jsonl, .json, .parquet or .arrow file, a folder with one, or a Hugging
        Face dataset on disk (see `tabular_dataset.open_tabular`). A name wins over a path of the same name.
    data_root
        Where the files of a named dataset lie; for a table, the folder that its image paths are relative to.
    num_samples
        The first samples; absent, all (400 for shapes).
    seed
        Of what is drawn, and of the order of options.
    options
        What this kind of dataset takes beside: distractor and split (shapes), shuffle and text_only (files),
        task (What'sUp), split and task (VSR), split, columns and answer_is (tables).

    Raises
    ------
    DatasetError    there is no such dataset, file or option, or its files are not complete.
    """
    name = str(name_or_path)
    builder = _BUILDERS.get(name) if isinstance(name_or_path, str) else None
    if builder is not None:
        arguments = options if name == "shapes" else {"data_root": data_root, **options}
    else:
        builder, arguments = partial(open_tabular, _table_path(name)), {"data_root": data_root, **options}
    _check_options(builder, arguments, name)
    if num_samples is not None:
        arguments["num_samples"] = num_samples
    dataset: Dataset = builder(seed=seed, **arguments)
    return dataset


def dataset_names() -> tuple[str, ...]:
    """The names that `open_dataset` knows."""
    return tuple(_BUILDERS)


def _table_path(name: str) -> Path:
    path = Path(name)
    if path.exists():
        owner = _owner(path.name)
        if owner is not None:
            raise DatasetError(
                f"'{path}' is the question file of {owner}; it does not say which image a question is about.",
                f"Use --dataset {owner} --data-root '{path.parent}', with its annotations and images there "
                f"(or --text-only, text_only=True).",
            )
        return path
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise DatasetError(f"There is no file or folder '{path}'.", f"Check the path; {_known()}.")
    folded = {known.casefold(): known for known in _BUILDERS}
    close = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(folded[each] for each in close)}?" if close else ""
    raise DatasetError(
        f"There is no dataset '{name}', and no file or folder of that name.{meant}",
        f"{_known()[0].upper()}{_known()[1:]}; or give the path of a .jsonl or .parquet file or a folder.",
    )


def _known() -> str:
    return f"the datasets are {', '.join(_BUILDERS)}"


def _owner(file_name: str) -> str | None:
    """Which named dataset a question file belongs to."""
    if file_name == QUESTIONS:
        return "VSR"
    return next((source.name for source in SOURCES.values() if source.questions == file_name), None)


def _check_options(builder: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
    taken = [
        parameter
        for parameter in inspect.signature(builder).parameters
        if parameter not in ("seed", "num_samples")
    ]
    unknown = [argument for argument in arguments if argument not in taken]
    if unknown:
        known = [parameter for parameter in taken if parameter not in ("data_root", "name", "path")]
        raise DatasetError(f"The dataset {name} has no option {unknown[0]!r}.", f"It has {', '.join(known)}.")


_BUILDERS: dict[str, Callable[..., Dataset]] = {
    "shapes": Shapes,
    **{name: partial(open_whatsup, name) for name in SOURCES},
    "VSR": open_vsr,
}
