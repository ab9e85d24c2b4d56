"""Memory for what is captured, used again: to clear new pages costs the kernel as much as filling them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Batches differ in length; pages that are never touched cost nothing.
SPARE = 1.25


class Room:
    """Makes arrays in memory that comes back when nothing refers to them, or to a view of them, any more."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """A C-contiguous array of any content."""
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        memory = self._take(count * np.dtype(dtype).itemsize)
        # Every view has this array for its base, and none the memory itself, as the memory is no array.
        whole: NDArray[Any] = np.frombuffer(memory, dtype, count)
        # In any thread; an append needs no lock.
        weakref.finalize(whole, self._free.append, memory).atexit = False
        return whole.reshape(shape)

    def _take(self, size: int) -> memoryview:
        """The smallest that holds so much. Else the largest makes way for a new one: none is held in vain."""
        held = [len(memory) for memory in self._free]
        wanted = min((each for each in held if each >= size), default=max(held, default=0))
        memory = self._free.pop(held.index(wanted)) if held else None
        return np.empty(int(size * SPARE), np.uint8).data if memory is None or wanted < size else memory
