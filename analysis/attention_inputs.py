"""What attention is rebuilt from: the q and k groups of a run, which belong together, and their rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import site
from mechanistic.store.errors import DataError, FormatError

from .mask_rules import AttentionRule, read_rules
from .take_rows import take_rows
from .token_selection import select_layers, select_tokens, token_axis, token_mask


@dataclass(frozen=True)
class AttentionInputs:
    """Queries (layer, token, head, d_head), complete keys (layer, token, kv_head, d_head), a rule a layer.

    `kv_of_head` holds, for each captured query head, the index of the key head that it reads.
    """

    query: xr.Dataset
    key: xr.Dataset
    query_name: str
    key_name: str
    rules: dict[int, AttentionRule]
    kv_of_head: NDArray[np.int64]


def attention_inputs(
    run: xr.DataTree,
    *,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
) -> AttentionInputs:
    """Find q and k of one stack, and keep the query rows, layers and samples asked for; keys stay complete.

    Parameters
    ----------
    cross
        Take xq and xk, the queries and keys of the stack's cross-attention.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    SpecificationError  a layer, sample or token selection that it does not hold.
    DataError           k lacks tokens or layers, so that rows would not be the model's.
    FormatError         a layer's rule is missing or unknown.
    """
    mark = "x" if cross else ""
    query_name, key_name = f"{stack}/{mark}q", f"{stack}/{mark}k"
    query, key = site(run, query_name), site(run, key_name)
    kept = key.attrs.get("tokens")
    if kept != "all":
        raise DataError(
            f"{key_name} holds the tokens {kept!r} only, so attention rows cannot be rebuilt.",
            f"Capture complete keys: --sites '{stack}.*.{mark}k[all]'.",
        )
    query = select_rows(select_layers(query, layer), tokens, sample)
    numbers = np.asarray(query["layer"].values)
    if missing := sorted(set(numbers.tolist()) - set(np.asarray(key["layer"].values).tolist())):
        raise DataError(
            f"{key_name} lacks layer {', '.join(map(str, missing))}, which {query_name} has.",
            f"Choose layers that both hold (layer=...), or capture '{stack}.*.{mark}k[all]'.",
        )
    key = select_layers(key, numbers.tolist())
    rules = read_rules(
        query.attrs.get("attention", {}), numbers, np.asarray(query["head"].values), query_name
    )
    return AttentionInputs(query, key, f"{mark}q", f"{mark}k", rules, _kv_of_head(query, key, query_name))


def select_rows(dataset: xr.Dataset, tokens: str | None, sample: int | Sequence[int] | None) -> xr.Dataset:
    """Both selections in one step: taking rows twice would read blocks that hold none of the result."""
    if sample is None:
        return select_tokens(dataset, tokens)
    owner, wanted = np.asarray(dataset["sample_index"].values), np.atleast_1d(sample)
    chosen = np.isin(owner, wanted)
    if tokens is not None:
        chosen &= token_mask(dataset, tokens)
    missing = np.setdiff1d(wanted, owner[chosen])
    if missing.size:
        raise DataError(
            f"sample {', '.join(map(str, missing.tolist()))} has no such tokens here.",
            f"Samples are rows of samples/; those held are between {owner.min()} and {owner.max()}.",
        )
    return take_rows(dataset, token_axis(dataset), np.flatnonzero(chosen))


def _kv_of_head(query: xr.Dataset, key: xr.Dataset, where: str) -> NDArray[np.int64]:
    """Query head h reads key head h // (heads per key head); a subset of heads must say how many that is."""
    heads, kv_heads = np.asarray(query["head"].values), np.asarray(key["kv_head"].values)
    shared = query.attrs.get("heads_per_kv_head")
    if shared is None:
        complete = np.array_equal(heads, np.arange(len(heads))) and np.array_equal(
            kv_heads, np.arange(len(kv_heads))
        )
        if not complete or len(heads) % len(kv_heads):
            raise FormatError(
                f"{where} has {len(heads)} heads for {len(kv_heads)} key heads, not saying who reads which.",
                "Its attribute `heads_per_kv_head` must say how many query heads read one key head.",
            )
        shared = len(heads) // len(kv_heads)
    wanted = heads // int(shared)
    if missing := sorted(set(wanted.tolist()) - set(kv_heads.tolist())):
        raise DataError(
            f"the key heads {', '.join(map(str, missing))}, which heads of {where} read, were not captured.",
            "Capture k without a selection of heads.",
        )
    index = {int(number): place for place, number in enumerate(kv_heads)}
    return np.array([index[int(number)] for number in wanted], np.int64)
