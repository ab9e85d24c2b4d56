"""The attention weights of one sample, rebuilt exactly from its q and k, or as they were stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import SpecificationError

from .attention_inputs import AttentionInputs, attention_inputs
from .attention_rows import walk_rows
from .attention_weights import PATTERN
from .blocks import align_blocks, map_blocks
from .mask_rules import AttentionRule, mask_columns
from .stored_pattern import only_stored, stored_rows
from .token_selection import head_places, token_axis

# Bounds the rows of one sample of one layer, as stored: far above any model's, since one sample is asked for.
_MAX_BYTES = 8 << 30


def attention_pattern(
    run: xr.DataTree,
    *,
    sample: int,
    layer: int | Sequence[int] | None = None,
    head: int | Sequence[int] | None = None,
    query: str | int | None = None,
    stack: str = "text",
    cross: bool = False,
) -> xr.Dataset:
    """Attention weights of one sample, A = softmax over the allowed keys of softcap(scale * q.k); lazy.

    Parameters
    ----------
    sample
        A row of samples/.
    layer, head
        True numbers. One number drops the dimension, a list keeps it, None means all that are captured.
    query
        The query rows: a selection such as ``"last"`` or ``"'?'"`` (see `select_tokens`), one position within
        the sample, which drops the dimension, or None for every captured row.
    cross
        The stack's cross-attention, from xq and xk or xpattern: the keys are tokens of the image encoder.

    Returns
    -------
    attention_pattern (layer, head, query, key), float32, share of the row.
        Rows sum to 1, or to less where the layer has attention sinks, which the attribute `sinks` says; 0
        for a key that the query may not look at; NaN where it may look at none. The labels of the tokens are
        coordinates with the prefixes ``query_`` and ``key_``.

    Raises
    ------
    MissingSiteError    the run lacks q or k, and has no stored pattern either.
    SpecificationError  a layer, head or selection that it does not hold.
    DataError           the sample has no such rows, its keys are not complete, or (when computed) not finite.
    """
    tokens = f"@{_position(query)}" if isinstance(query, int | np.integer) else query
    rows = stored_rows if only_stored(run, stack, cross=cross) else _rebuilt_rows
    chosen: dict[str, Any] = {"sample": _one(sample), "layer": layer, "head": head, "tokens": tokens}
    values, queries, keys = rows(run, stack=stack, cross=cross, **chosen)
    attrs = {"units": "1", "long_name": "attention weight", **values.attrs}
    pattern = values.assign_attrs(attrs).to_dataset(name=PATTERN)
    pattern = pattern.assign_coords(_prefixed(queries, "query") | _prefixed(keys, "key"))
    pattern = pattern.transpose("layer", "head", "query", "key").assign_attrs(sample=int(sample), stack=stack)
    single = {"layer": layer, "head": head, "query": query if isinstance(query, int | np.integer) else None}
    return pattern.isel(
        {dim: 0 for dim, value in single.items() if value is not None and np.ndim(value) == 0}
    )


def _rebuilt_rows(
    run: xr.DataTree,
    *,
    stack: str,
    sample: int,
    layer: int | Sequence[int] | None,
    head: int | Sequence[int] | None,
    tokens: str | None,
    cross: bool,
) -> tuple[xr.DataArray, xr.Dataset, xr.Dataset]:
    """As `stored_rows` gives them, from q and k."""
    inputs = _select_heads(
        attention_inputs(run, stack=stack, cross=cross, tokens=tokens, layer=layer, sample=sample), head
    )
    blocks = align_blocks(inputs.query[inputs.query_name], inputs.key[inputs.key_name], max_bytes=_MAX_BYTES)
    rebuilt = map_blocks(
        partial(_pattern_kernel, rules=inputs.rules, kv_of_head=inputs.kv_of_head),
        blocks,
        query_columns=mask_columns(inputs.query),
        key_columns=mask_columns(inputs.key),
        shape=(inputs.query.sizes["head"], blocks.key.sizes[token_axis(inputs.key)]),
    )
    values = xr.DataArray(rebuilt, dims=("layer", "query", "head", "key"))
    values = values.assign_coords({name: inputs.query[name] for name in ("layer", "head")})
    if any(rule.sinks is not None for rule in inputs.rules.values()):
        values.attrs["sinks"] = True
    return values, inputs.query, blocks.key.to_dataset(name="k")


def _pattern_kernel(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Mapping[str, NDArray[Any]],
    key_columns: Mapping[str, NDArray[Any]],
    *,
    rules: Mapping[int, AttentionRule],
    kv_of_head: NDArray[np.int64],
) -> NDArray[np.float32]:
    """(query, head, key) of one sample; keys beyond those that a piece of rows may look at stay 0."""
    pattern = np.zeros((query.shape[0], query.shape[1], key.shape[0]), np.float32)
    for rows, part in walk_rows(layer, query, key, query_columns, key_columns, rules[layer], kv_of_head):
        pattern[rows.start : rows.stop, part.heads, : part.weights.shape[-1]] = part.weights.transpose(
            1, 0, 2
        )
    return pattern


def _select_heads(inputs: AttentionInputs, head: int | Sequence[int] | None) -> AttentionInputs:
    if head is None:
        return inputs
    places = head_places(inputs.query["head"], head)
    return AttentionInputs(
        inputs.query.isel(head=places),
        inputs.key,
        inputs.query_name,
        inputs.key_name,
        {layer: rule.of_heads(places) for layer, rule in inputs.rules.items()},
        inputs.kv_of_head[places],
    )


def _prefixed(group: xr.Dataset, role: str) -> dict[str, Any]:
    axis = token_axis(group)
    return {
        f"{role}_{name}": (role, coord.data, coord.attrs)
        for name, coord in group.coords.items()
        if coord.dims == (axis,)
    }


def _one(sample: int) -> int:
    if not isinstance(sample, int | np.integer):
        raise SpecificationError(
            f"sample is {sample!r}, which is not one row of samples/.",
            "A pattern belongs to one sample: sample=0. Of many: attention_entropy, attention_mass.",
        )
    return int(sample)


def _position(query: int | np.integer[Any]) -> int:
    if query < 0:
        raise SpecificationError(
            f"query is {query}.", f"Count from the end of the prompt with query='@{query}'."
        )
    return int(query)
