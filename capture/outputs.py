"""What an output folder holds already: nothing, this job's run, or something that must not be touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechanistic.store import read_manifest
from mechanistic.store.differences import differences, other_settings
from mechanistic.store.draft import drafts
from mechanistic.store.errors import OutputExistsError
from mechanistic.store.lock import require_no_writer
from mechanistic.store.manifest import MANIFEST
from mechanistic.store.merge import MERGED
from mechanistic.store.parts import PARTS, part_count, root_attributes
from mechanistic.store.root import is_begun, no_run

from .dataset import Dataset
from .parts import PartOf


def holds_something(path: Path) -> bool:
    """Whether a path exists and is not just an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def find_output(
    path: Path, model: Mapping[str, str], dataset: Dataset, capture: Mapping[str, Any], part: PartOf | None
) -> tuple[Path, bool]:
    """Where a job writes, and whether it has nothing left to do there; decided before its model is loaded.

    Parameters
    ----------
    model, capture
        What the run's attributes of that name will say; of the model, as far as it is known already.

    Raises
    ------
    OutputExistsError    something else is there, or another process is writing this very run. What only a
                         loaded model can tell is compared when the run is opened.
    """
    about = {"name": dataset.name, "hash": dataset.fingerprint(), "num_samples": len(dataset)}
    wanted = {"model": model, "dataset": about, "capture": capture}
    # Once merged, a run in parts is a plain one, which holds every part.
    if part is None or (path / MANIFEST).is_file():
        finished = _is_finished(path, wanted)
        if part is not None and not finished and MERGED not in root_attributes(path):
            raise OutputExistsError(
                f"{path} is an unfinished run of one part.",
                "Continue it without --parts, or choose another --output-dir to start afresh.",
            )
        return path, finished
    whole = {**wanted, PARTS: part.count}
    if is_begun(path) and (different := _different(path, whole)):
        raise other_settings(path, different)
    own = {**wanted, "capture": {**capture, "part": part.attributes(len(dataset))}}
    return part.path(path), _is_finished(part.path(path), own)


def _is_finished(path: Path, wanted: Mapping[str, Any]) -> bool:
    if not holds_something(path):
        for draft in drafts(path):
            require_no_writer(path, draft)
        return False
    parts = part_count(path)
    if parts is not None:
        raise OutputExistsError(
            f"{path} is a run in {parts} parts.",
            f"Continue it with --parts {parts} --part N, or make it one store: mechanistic merge {path}",
        )
    if not path.is_dir() or not (path / MANIFEST).is_file():
        raise no_run(path)
    finished = read_manifest(path).complete
    different = _different(path, wanted)
    if different and finished:
        raise OutputExistsError(
            f"{path} is a finished run of another job: {'; '.join(different)}.",
            "Choose another output folder; nothing there was touched.",
        )
    if different:
        raise other_settings(path, different)
    if not finished:
        require_no_writer(path)
    return finished


def _different(path: Path, wanted: Mapping[str, Any]) -> list[str]:
    stored = root_attributes(path)
    for about in ("model", "dataset"):
        held = stored.get(about, {})
        stored[about] = {name: held[name] for name in wanted[about] if name in held}
    return differences(stored, wanted)
