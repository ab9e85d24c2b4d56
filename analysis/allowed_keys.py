"""Which keys the queries of rebuilt attention rows may look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .attention_rows import MASKED, AttentionRows


def allowed_keys(rows: AttentionRows) -> NDArray[np.bool_]:
    """(query, key): True where the layer's mask lets the query look; the heads of a layer share one mask."""
    return np.asarray(rows.scores[0] > MASKED / 4)
