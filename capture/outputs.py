"""What an output folder holds already: nothing, this job's run, or something that must not be touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zarr

from mechanistic.store import read_manifest
from mechanistic.store.differences import differences
from mechanistic.store.errors import OutputExistsError
from mechanistic.store.parts import part_count

from .dataset import Dataset


def holds_something(path: Path) -> bool:
    """Whether a path exists and is not just an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def is_finished(path: Path, model: dict[str, str], dataset: Dataset, capture: dict[str, Any]) -> bool:
    """Whether `path` holds this very job's finished run; `model` and `capture` are of its attributes.

    OutputExistsError if it holds something else that is finished, no run, or a run in parts.

    An unfinished run is left for the writer to judge, which also compares what only a loaded model can tell.
    """
    if not holds_something(path):
        return False
    parts = part_count(path)
    if parts is not None:
        raise OutputExistsError(
            f"{path} is a run in {parts} parts.",
            f"Continue it with --parts {parts} --part N, or make it one store: mechanistic merge {path}",
        )
    if not path.is_dir() or not (path / "manifest.json").is_file():
        raise OutputExistsError(
            f"{path} exists and is not a run.", "Choose another output folder; nothing there was touched."
        )
    if not read_manifest(path).complete:
        return False
    stored = dict(zarr.open_group(str(path), mode="r").attrs)
    different = differences(stored, {"capture": capture})
    about = {"name": dataset.name, "hash": dataset.fingerprint(), "num_samples": len(dataset)}
    for key, values in (("model", model), ("dataset", about)):
        held: Any = stored.get(key, {})
        different += [
            f"{key}.{name} is {held.get(name)!r}, not {value!r}"
            for name, value in values.items()
            if held.get(name) != value
        ]
    if different:
        raise OutputExistsError(
            f"{path} is a finished run of another job: {'; '.join(different)}.",
            "Choose another output folder; nothing there was touched.",
        )
    return True
