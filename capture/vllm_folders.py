"""Folders for what workers leave, filled again: to fill pages that the kernel has is a tenth of the work."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Lent:
    """A folder that nobody else gets while anything refers to this, or to numbers that are mapped in it."""

    path: Path


class Folders:
    """Lends folders within `parent`, those before new ones that came back."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._free: list[Path] = []
        self._made = 0

    def take(self) -> Lent:
        """A folder, maybe with old files in it."""
        if self._free:
            path = self._free.pop()
        else:
            path = self._parent / f"spool{self._made}"
            path.mkdir()
            self._made += 1
        lent = Lent(path)
        # In any thread; an append needs no lock.
        weakref.finalize(lent, self._free.append, path).atexit = False
        return lent
