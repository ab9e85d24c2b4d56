"""Memory that runs out, on a device or on the host."""

from __future__ import annotations

import ctypes

import torch

_SAYS_FULL = ("out of memory", "can't allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in _SAYS_FULL)


def free_memory() -> None:
    """Give back what is free and kept for later: by torch to the device, by glibc to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
