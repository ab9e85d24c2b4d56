"""Memory for what is captured, used again: to clear new pages costs the kernel as much as filling them."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Batches differ in length; pages that are never touched cost nothing.
SPARE = 1.25

Memory = mmap.mmap


class Room:
    """Memory that comes back when nothing refers to the arrays made in it, or to views of them, any more.

    What a forward gives is taken memory for as it comes, and lent as arrays when the forward is over: arrays
    that stay, allocated among the tensors that come and go, would leave holes in the C library's heap, which
    then grows by half.
    """

    def __init__(self) -> None:
        self._free: list[Memory] = []

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> Memory | None:
        """Memory of any content for such an array; None for an empty one."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return self._take(size) if size else None

    def lend(self, memory: Memory | None, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """The C-contiguous array for which memory was taken, which comes back behind it."""
        array = seen_as(memory, shape, dtype)
        if memory is not None:
            # Every view has this base, and none the memory itself, as the memory is no array. In any thread:
            # an append needs no lock.
            weakref.finalize(array.base, self._free.append, memory).atexit = False
        return array

    def _take(self, size: int) -> Memory:
        """The smallest that holds so much. Else the largest makes way for a new one: none is held in vain."""
        held = [len(memory) for memory in self._free]
        wanted = min((each for each in held if each >= size), default=max(held, default=0))
        memory = self._free.pop(held.index(wanted)) if held else None
        if memory is None or wanted < size:
            # Pages of its own, which go back to the system when it makes way.
            return mmap.mmap(-1, int(size * SPARE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memory


def seen_as(memory: Memory | None, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """What was taken, as the array that it is for."""
    if memory is None:
        return np.empty(shape, dtype)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
