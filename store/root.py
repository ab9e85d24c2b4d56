"""The root of a run of several parts: the one thing that its writers share, written once."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .differences import differences, other_settings
from .errors import OutputExistsError
from .manifest import MANIFEST, sync
from .parts import PARTS, root_attributes
from .schema import FORMAT, FORMAT_VERSION


def open_root(run: str | Path, attributes: Mapping[str, Any], *, parts: int) -> None:
    """Make the root of a run of `parts` parts, or check that it is this very job's. Many may try at once.

    Raises
    ------
    OutputExistsError    the folder holds something else, or the run of a job with other settings.
    """
    folder = Path(run)
    wanted = {**attributes, PARTS: parts}
    if not is_begun(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _create(folder, wanted)
    # Left by a job that was killed here; one that is still at it needs it no more, since the root is there.
    for draft in folder.glob("zarr.json.*.partial"):
        draft.unlink(missing_ok=True)
    different = differences(root_attributes(folder), wanted)
    if different or (folder / MANIFEST).exists():
        raise other_settings(folder, different or ["it is not in parts"])


def is_begun(folder: Path) -> bool:
    """Whether the root of a run in parts is there; OutputExistsError where what is there is no run."""
    if (folder / "zarr.json").exists():
        if root_attributes(folder).get("format") != FORMAT:
            raise no_run(folder)
        return True
    if folder.exists():
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else [folder.name]
        held = [name for name in names if not name.startswith("zarr.json")]
        if held and held != [PARTS]:
            raise no_run(folder)
    return False


def no_run(path: Path) -> OutputExistsError:
    """What a job is told that would write over something of another kind."""
    return OutputExistsError(
        f"{path} exists and is not a run.", "Choose another output folder; nothing there was touched."
    )


def _create(folder: Path, attributes: Mapping[str, Any]) -> None:
    stamp = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run_id": secrets.token_hex(8),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    draft = folder / f"zarr.json.{secrets.token_hex(4)}.partial"
    with draft.open("w") as file:
        json.dump({"zarr_format": 3, "node_type": "group", "attributes": {**stamp, **attributes}}, file)
        file.flush()
        os.fsync(file.fileno())
    # A link, unlike a rename, never replaces the root that another job made meanwhile.
    with suppress(FileExistsError, FileNotFoundError):
        os.link(draft, folder / "zarr.json")
    draft.unlink(missing_ok=True)
    sync(folder)
