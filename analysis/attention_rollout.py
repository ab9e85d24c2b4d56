"""Attention followed through the layers: how much of each token's final state came from each input token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import DataError, DimensionError

from .attention_inputs import AttentionInputs
from .attention_transitions import (
    Fusion,
    square_inputs,
    transition_matrices,
    transition_rows,
)
from .attention_weights import attention_weights
from .blocks import MAX_BYTES, AlignedBlocks, align_blocks
from .mask_rules import AttentionRule, mask_columns
from .token_selection import token_axis, token_mask

_ATTRS = {"units": "1", "long_name": "attention rollout"}


@overload
def attention_rollout(
    attention: xr.DataTree,
    *,
    sample: int,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    stack: str = "text",
    layer: Sequence[int] | None = None,
) -> xr.Dataset: ...
@overload
def attention_rollout(
    attention: ArrayLike,
    *,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
) -> NDArray[Any]: ...
def attention_rollout(
    attention: Any,
    *,
    sample: int = 0,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    stack: str = "text",
    layer: Sequence[int] | None = None,
) -> Any:
    """Attention rollout of every token of one sample, R_l = A_l R_(l-1), from the lowest layer upwards.

    A_l = residual I + (1 - residual) F_l, each row divided by its sum, F_l the heads fused. For one row of
    many samples `rollout_row` gives the same at the cost of a row.

    Parameters
    ----------
    attention
        A run, or weights (layer, head, query, key) as an array or tensor, for which a numpy array comes back.
    sample
        A row of samples/; for a run only.
    discard
        The share of each row's non-zero fused weights, the smallest, that is set to 0 before the residual is
        added.
    layer
        Consecutive layers; None means all.

    Returns
    -------
    attention_rollout (layer, query, key), float32, share of the query's state after the layer that entered at
        the key below the lowest layer. Rows sum to 1; NaN where a query may look at no key.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           q or k lacks tokens, or layers have gaps.
    SpecificationError  an unknown fusion, or a share out of its range.
    DimensionError      plain weights that are not (layer, head, token, token).

    References
    ----------
    Abnar and Zuidema (2020), Quantifying Attention Flow in Transformers.
    """
    fusion = Fusion(head_fusion, residual, discard)
    if not isinstance(attention, xr.DataTree):
        return _rollout_of_weights(attention, fusion)
    matrices = transition_matrices(attention, fusion, sample=sample, stack=stack, layer=layer)
    rolled = [matrices.data[0]]
    for place in range(1, matrices.sizes["layer"]):
        rolled.append(da.matmul(matrices.data[place], rolled[-1]))
    variable = matrices.copy(data=da.stack(rolled)).assign_attrs(_ATTRS)
    return variable.to_dataset(name="attention_rollout").assign_attrs(sample=int(sample), stack=stack)


def rollout_row(
    run: xr.DataTree,
    *,
    tokens: str = "last",
    head_fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    stack: str = "text",
    layer: Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Attention rollout of one row of each sample, from the top layer down: v_l = v_(l+1) A_l.

    Above the top layer v is one-hot. Vectors are multiplied with a few rows at a time; there is no
    [token, token] product, nor a [token, token] matrix. Lazy.

    Parameters
    ----------
    tokens
        The row, such as ``"last"``; several tokens of a sample share the start, which averages their rows.
    head_fusion, residual, discard, layer
        As in `attention_rollout`.
    stack, sample, max_bytes
        Which rows: see `attention_statistics`.

    Returns
    -------
    attention_rollout (layer, token), float32, share of the row's final state that the token's residual
        stream carries at the input of the layer. In the lowest layer this is the rollout of the paper. Sums
        to 1 over the tokens of a sample.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           q or k lacks tokens, layers have gaps, or a sample has no such token.
    SpecificationError  an unknown fusion, a share out of its range, or a selection that does not parse.

    References
    ----------
    Abnar and Zuidema (2020), Quantifying Attention Flow in Transformers.
    """
    fusion = Fusion(head_fusion, residual, discard)
    inputs = square_inputs(run, stack=stack, layer=layer, sample=sample)
    blocks = align_blocks(inputs.query[inputs.query_name], inputs.key[inputs.key_name], max_bytes=max_bytes)
    axis = token_axis(inputs.query)
    chunks = blocks.query.chunksizes[axis]
    state = da.from_array(_start(inputs.query, tokens), chunks=(chunks,))
    carried = []
    for place in reversed(range(inputs.query.sizes["layer"])):
        state = _layer_below(state, place, blocks, inputs, fusion)
        carried.append(state)
    coords = {n: c for n, c in inputs.query.coords.items() if set(c.dims) <= {"layer", axis}}
    result = xr.Dataset({"attention_rollout": (("layer", axis), da.stack(carried[::-1]), _ATTRS)}, coords)
    return result.assign_attrs(stack=stack, tokens=tokens, computed_from="q and k").chunk({axis: chunks})


def _start(query: xr.Dataset, tokens: str) -> NDArray[np.float32]:
    """Ones at the chosen tokens, divided by how many their sample has."""
    chosen = token_mask(query, tokens)
    owner = np.asarray(query["sample_index"].values)
    counts = np.bincount(owner, chosen, minlength=int(owner.max(initial=-1)) + 1)
    if (counts[owner] == 0).any():
        raise DataError(
            f"sample {owner[counts[owner] == 0][0]} has no token that is {tokens}.",
            "Choose a token that every sample has, such as tokens='last', or samples with sample=[...].",
        )
    return np.asarray(chosen / counts[owner], np.float32)


def _layer_below(
    state: Any, place: int, blocks: AlignedBlocks, inputs: AttentionInputs, fusion: Fusion
) -> Any:
    """Carry the state through one layer, block by block."""
    number = int(inputs.query["layer"][place])
    names = ("sample_index", *mask_columns(inputs.query))
    arguments: list[Any] = [state, "t", blocks.query.data[place], "tab", blocks.key.data[place], "tcd"]
    for name in names:
        arguments += [da.asarray(blocks.query[name].data).rechunk(state.chunks), "t"]
    return da.blockwise(
        partial(_step, layer=number, rule=inputs.rules[number], kv_of_head=inputs.kv_of_head, fusion=fusion),
        "t",
        *arguments,
        names=names,
        concatenate=True,
        align_arrays=False,
        dtype=np.float32,
        meta=np.empty(0, np.float32),
    )


def _step(
    state: NDArray[np.float32],
    query: NDArray[Any],
    key: NDArray[Any],
    *values: NDArray[Any],
    names: tuple[str, ...],
    layer: int,
    rule: AttentionRule,
    kv_of_head: NDArray[np.int64],
    fusion: Fusion,
) -> NDArray[np.float32]:
    columns: Mapping[str, NDArray[Any]] = dict(zip(names, values, strict=True))
    # What carries nothing passes nothing on; in the top layer that is all but one row.
    rows = np.flatnonzero(state)
    near = {name: column[rows] for name, column in columns.items()}
    below = np.zeros_like(state)
    walk = transition_rows(layer, query[rows], key, near, columns, rule, kv_of_head, fusion)
    for piece, own, matrix in walk:
        first = rows[piece.start] - own[0]
        below[first : first + matrix.shape[-1]] += state[rows[piece]] @ matrix
    return below


def _rollout_of_weights(values: Any, fusion: Fusion) -> NDArray[Any]:
    weights = attention_weights(values)
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
        raise DimensionError(
            f"rollout needs weights (layer, head, token, token); these have the shape {weights.shape}.",
            "Stack the attentions of one sample: np.stack([layer[0] for layer in output.attentions]).",
        )
    own = np.arange(weights.shape[-1])
    rolled: list[NDArray[Any]] = []
    for layer in weights:
        matrix = fusion.of_heads(layer, own)
        rolled.append(matrix @ rolled[-1] if rolled else matrix)
    return np.stack(rolled)
