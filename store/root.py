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

from .differences import differences
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
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {**attributes, PARTS: parts}
    if not (folder / "zarr.json").exists():
        held = [entry.name for entry in folder.iterdir() if not entry.name.startswith("zarr.json")]
        if held and held != [PARTS]:
            raise OutputExistsError(
                f"{folder} exists and is not a run.",
                "Choose another output folder; nothing there was touched.",
            )
        _create(folder, wanted)
    different = differences(root_attributes(folder), wanted)
    if different or (folder / MANIFEST).exists():
        why = "; ".join(different) or "it is not in parts"
        raise OutputExistsError(
            f"{folder} was captured with other settings: {why}.",
            "Use the same settings to continue it, or another --output-dir to start afresh.",
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
    with suppress(FileExistsError):
        os.link(draft, folder / "zarr.json")
    draft.unlink()
    sync(folder)
