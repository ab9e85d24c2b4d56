"""Rows of attention to patch from: rebuilt from a run's q and k, or as it stored them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from .attention_pattern import attention_pattern

if TYPE_CHECKING:
    from mechanistic.capture.known_states import Rows


def pattern_source(run: xr.DataTree, stack: str, layer: int, sample: int) -> Rows:
    """The rows (query, head, key) of one sample that the run has, whole. Raises like `attention_pattern`."""
    import torch

    from mechanistic.capture.known_states import Rows

    found = attention_pattern(run, sample=sample, layer=layer, stack=stack)["attention_pattern"]
    rows = found.transpose("query", "head", "key").compute(scheduler="synchronous")
    # A query that may look at no key attends to nothing.
    values = torch.from_numpy(np.nan_to_num(rows.values.astype(np.float32)))
    heads = tuple(int(head) for head in rows["head"].values)
    return Rows(rows["query_position"].values.astype(np.int64), values, heads)
