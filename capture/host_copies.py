"""Copies from a device to the host that do not keep the device waiting."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Copies in flight at most; each has a pinned buffer of the size of one layer's rows of one site.
BUFFERS = 8


class HostCopies:
    """Copies tensors into arrays: from CUDA on a stream of its own through pinned memory, else at once."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._flying: deque[tuple[Any, Tensor, NDArray[Any]]] = deque()

    def put(self, rows: Tensor, target: NDArray[Any]) -> None:
        """Fill `target` with `rows`, by the end of `finish` at the latest."""
        if rows.device.type != "cuda":
            target[...] = rows.cpu().numpy()
            return
        while len(self._flying) >= BUFFERS:
            self._land()
        device = rows.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        # The rows must be computed before they are copied, and their memory kept until they are.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            pinned.copy_(rows, non_blocking=True)
            rows.record_stream(stream)
            landed = stream.record_event()
        self._flying.append((landed, pinned, target))

    def finish(self) -> None:
        """Wait for every copy."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        landed, pinned, target = self._flying.popleft()
        landed.synchronize()
        np.copyto(target, pinned.numpy())
