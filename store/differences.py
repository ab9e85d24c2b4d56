"""What differs between the attributes of a run and those of a job that wants to continue it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import OutputExistsError

# These say nothing about content.
VOLATILE = (
    "run_id",
    "created",
    "software",
    "proven",
    "completeness",
    "merged_from_parts",
    "format",
    "format_version",
)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every attribute whose stored value is not the wanted one, as 'model.dtype is float32, not bfloat16'."""
    found = []
    for key in sorted(set(wanted) | (set(stored) if prefix else set())):
        if not prefix and key in VOLATILE:
            continue
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif _plain(old) != _plain(new):
            found.append(f"{prefix}{key} is {_plain(old)!r}, not {_plain(new)!r}")
    return found


def other_settings(path: Path, different: Sequence[str]) -> OutputExistsError:
    """What a job is told that wants to continue the run of another one."""
    return OutputExistsError(
        f"{path} was captured with other settings: {'; '.join(different)}.",
        "Use the same settings to continue it, or another --output-dir to start afresh.",
    )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
