"""Statistics of attention rows that were computed while the model ran, in place of those from q and k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from mechanistic.store import site, sites
from mechanistic.store.errors import MissingSiteError

from .attention_inputs import select_rows
from .token_selection import select_layers


def only_statistics(run: xr.DataTree, stack: str, *, cross: bool = False) -> bool:
    """Whether a run has numbers of attention rows, but not the q and k to compute any others from."""
    held, mark = set(sites(run)), "x" if cross else ""
    both = {f"{stack}/{mark}q", f"{stack}/{mark}k"}
    return f"{stack}/{mark}attn_stats" in held and not both <= held


def stored_statistics(
    run: xr.DataTree,
    wanted: Mapping[str, Mapping[str, Any]],
    *,
    stack: str,
    tokens: str | None,
    layer: int | Sequence[int] | None,
    sample: int | Sequence[int] | None,
    cross: bool = False,
) -> xr.Dataset:
    """The variables called as in `wanted`, if they mean what it says they do; rows as stored, lazy.

    Raises
    ------
    MissingSiteError    attn_stats lacks one, or holds one of another meaning, such as the mass on 5 keys for
                        that on 3.
    SpecificationError  a layer or token selection that it does not hold.
    DataError           no such rows.
    """
    mark = "x" if cross else ""
    stored = site(run, f"{stack}/{mark}attn_stats")
    odd = [name for name, attrs in wanted.items() if not _agrees(stored, name, attrs)]
    if odd:
        held = [_named(stored, str(name)) for name in stored.data_vars]
        asked = ", ".join(name + _parameters(wanted[name]) for name in odd)
        raise MissingSiteError(
            f"{stack}/{mark}attn_stats has no {asked}; it has {', '.join(held)}, and there are no {mark}q "
            f"and {mark}k here.",
            f"Capture the attention itself: --sites '{stack}.*.{mark}q' '{stack}.*.{mark}k[all]'.",
        )
    rows = select_rows(select_layers(stored[list(wanted)], layer), tokens, sample)
    kept = {key: stored.attrs[key] for key in ("stack", "tokens") if key in stored.attrs}
    rows.attrs = {**kept, "computed_from": f"{mark}attn_stats"}
    return rows


def _agrees(stored: xr.Dataset, name: str, attrs: Mapping[str, Any]) -> bool:
    return name in stored and all(stored[name].attrs.get(key) == value for key, value in attrs.items())


def _named(stored: xr.Dataset, name: str) -> str:
    return name + _parameters(stored[name].attrs)


def _parameters(attrs: Mapping[str, Any]) -> str:
    """What a variable's name leaves open, such as `` (k=5)``."""
    shown = [f"{key}={attrs[key]}" for key in ("k", "mass", "measure") if key in attrs]
    return f" ({', '.join(shown)})" if shown else ""
