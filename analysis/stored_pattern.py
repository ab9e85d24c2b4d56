"""Attention rows that were stored as they are, found by their start and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from mechanistic.store import group, site, sites

from .attention_inputs import select_rows
from .token_selection import head_places, select_layers


def only_stored(run: xr.DataTree, stack: str, *, cross: bool = False) -> bool:
    """Whether a run has rows of attention, but not the q and k to rebuild them from."""
    held, mark = set(sites(run)), "x" if cross else ""
    return f"{stack}/{mark}pattern" in held and not {f"{stack}/{mark}q", f"{stack}/{mark}k"} <= held


def stored_rows(
    run: xr.DataTree,
    *,
    stack: str,
    sample: int,
    layer: int | Sequence[int] | None,
    head: int | Sequence[int] | None,
    tokens: str | None,
    cross: bool = False,
) -> tuple[xr.DataArray, xr.Dataset, xr.Dataset]:
    """The rows of one sample (layer, query, head, key), lazy, and the labels of its queries and of its keys.

    Raises
    ------
    MissingSiteError    the run holds no pattern.
    SpecificationError  a layer, head or token selection that it does not hold.
    DataError           the sample has no such rows.
    """
    name = "xpattern" if cross else "pattern"
    rows = select_rows(site(run, f"{stack}/{name}_rows"), tokens, sample)
    held = select_layers(site(run, f"{stack}/{name}"), layer)
    weights = held[name]
    if head is not None:
        weights = weights.isel(head=head_places(weights["head"], head))
    # The keys of cross-attention are in no table of tokens.
    table = group(run, f"{stack}/{name}_keys" if cross else f"tokens/{stack.partition('_')[0]}")
    axis = str(table["sample_index"].dims[0])
    keys = table.isel({axis: np.flatnonzero(table["sample_index"].values == sample)})
    places = zip(*(rows[name].values.tolist() for name in ("start", "length", "key_start")), strict=True)
    whole = [
        _widened(weights.data[:, start : start + length], first, keys.sizes[axis])
        for start, length, first in places
    ]
    values = xr.DataArray(da.stack(whole, axis=1), dims=("layer", "query", "head", "key"))
    values = values.assign_coords(layer=weights["layer"], head=weights["head"])
    rules = held.attrs.get("attention", {})
    if any(rules.get(str(number), {}).get("sinks") for number in held["layer"].values):
        values.attrs["sinks"] = True
    labels = rows.drop_vars(["start", "length", "key_start"])
    return values, labels, keys.set_coords([str(name) for name in keys.data_vars])


def _widened(weights: Any, first: int, keys: int) -> Any:
    """(layer, stored keys, head) as (layer, head, all keys): 0 where the row has no entry."""
    after = keys - first - weights.shape[1]
    return da.pad(weights, ((0, 0), (first, after), (0, 0))).transpose(0, 2, 1)
