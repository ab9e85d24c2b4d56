"""Which keys the queries of rebuilt attention rows may look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .attention_rows import MASKED, AttentionRows


def allowed_keys(rows: AttentionRows) -> NDArray[np.bool_]:
    """(query, key): True where the layer's mask lets the query look; the heads of a layer share one mask."""
    # A row that may look at nothing was shifted by MASKED itself; its totals are NaN.
    some = ~np.isnan(rows.totals[0])
    return np.asarray((rows.scores[0] > MASKED / 2) & some[:, None])
