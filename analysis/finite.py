"""Numbers that are not finite are named, never averaged away."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import DataError


def require_finite(
    values: NDArray[Any], sample: ArrayLike, layer: ArrayLike, *, sums: NDArray[Any] | None = None
) -> None:
    """Refuse rows of values that hold NaN or infinity.

    `sample` and `layer` broadcast to the leading axes of `values`, those of rows; the others are features.
    `sums` are numbers of the rows that are finite only where the row is, if the caller has such at hand.

    Raises
    ------
    DataError  names layer and samples.
    """
    axes = max(np.ndim(sample), np.ndim(layer))
    rows = values.reshape(*values.shape[:axes], -1)
    if sums is None:
        with np.errstate(invalid="ignore", over="ignore"):
            # A sum is finite only if its terms are, and takes a fifth of the time.
            sums = rows @ np.ones(rows.shape[-1], np.result_type(rows.dtype, np.float32))
    suspects = ~np.isfinite(sums)
    if not suspects.any():
        return
    suspects[suspects] = ~np.isfinite(rows[suspects]).all(axis=-1)
    if suspects.any():
        layers, samples = (np.unique(np.broadcast_to(n, sums.shape)[suspects]) for n in (layer, sample))
        named = ", ".join(map(str, samples[:5].tolist())) + (", ..." if len(samples) > 5 else "")
        raise DataError(
            f"layer {layers[0]} holds NaN or infinity in {suspects.sum()} rows, of sample {named}.",
            "Capture these samples again (half precision overflows at 65504), or leave them out.",
        )
