"""How information moves between tokens in one layer: heads fused to one matrix, the residual stream added.

What rollout multiplies and attention flow treats as capacities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .attention_inputs import AttentionInputs, attention_inputs
from .attention_rows import AttentionRows, walk_rows
from .blocks import Columns, align_blocks, map_blocks
from .mask_rules import AttentionRule, mask_columns
from .token_selection import token_axis

Floats = NDArray[np.float32]

_FUSIONS = ("mean", "max", "min")
# One sample of one layer, whose square of fused weights is asked for as a whole.
_MAX_BYTES = 8 << 30


@dataclass(frozen=True)
class Fusion:
    """How the attention of a layer becomes one transition matrix.

    A = r I + (1 - r) F, each row divided by its sum; F is the mean, maximum or minimum of the heads, in which
    the smallest `discard` of each row's non-zero weights are set to 0; r is the share of the `residual`.
    """

    heads: Literal["mean", "max", "min"] = "mean"
    residual: float = 0.5
    discard: float = 0.0

    def __post_init__(self) -> None:
        if self.heads not in _FUSIONS:
            raise SpecificationError(
                f"Heads cannot be fused by {self.heads!r}.", f"Fuse them by {', '.join(_FUSIONS)}."
            )
        if not 0 <= self.residual < 1 or not 0 <= self.discard < 1:
            raise SpecificationError(
                f"the residual share is {self.residual} and the discard ratio {self.discard}.",
                "Both are shares from 0 to below 1: residual=0.5, discard=0.",
            )

    def transition(self, fused: NDArray[Any], own: NDArray[np.int64]) -> NDArray[Any]:
        """Fused weights (query, key) as probabilities; `own` is each query's place among the keys."""
        matrix = (1 - self.residual) * self._discarded(fused)
        matrix[np.arange(len(own)), own] += self.residual
        return np.asarray(matrix / matrix.sum(axis=-1, keepdims=True))

    def _discarded(self, fused: NDArray[Any]) -> NDArray[Any]:
        if not self.discard:
            return fused
        # By row, as zeros above the diagonal of a causal layer would otherwise fill the quota.
        count = (fused > 0).sum(axis=-1, keepdims=True)
        first = fused.shape[-1] - count + np.floor(self.discard * count).astype(np.int64)
        places = np.argsort(np.argsort(fused, axis=-1, kind="stable"), axis=-1)
        return np.where(places >= first, fused, 0)

    def of_heads(self, weights: NDArray[Any], own: NDArray[np.int64]) -> NDArray[Any]:
        """Weights (head, query, key) as transition probabilities (query, key)."""
        if self.heads == "mean":
            return self.transition(np.asarray(weights.mean(axis=0)), own)
        reduce = np.maximum if self.heads == "max" else np.minimum
        return self.transition(np.asarray(reduce.reduce(weights, axis=0)), own)


def transition_rows(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Columns,
    key_columns: Columns,
    rule: AttentionRule,
    kv_of_head: NDArray[np.int64],
    fusion: Fusion,
) -> Iterator[tuple[slice, NDArray[np.int64], Floats]]:
    """A few rows at a time: which, the place of each among its sample's keys, and transitions (query, key).

    The keys end where the layer's mask lets none of these rows look.
    """
    walk = walk_rows(layer, query, key, query_columns, key_columns, rule, kv_of_head)
    for piece, parts in groupby(walk, key=lambda step: step[0]):
        fused = own = None
        for _, rows in parts:
            own = rows.query["position"].astype(np.int64)
            fused = _fuse(fused, rows, fusion, len(kv_of_head))
        assert fused is not None
        assert own is not None
        yield piece, own, fusion.transition(fused, own).astype(np.float32)


def _fuse(fused: Floats | None, rows: AttentionRows, fusion: Fusion, heads: int) -> Floats:
    """Add the heads of one group to those fused so far."""
    if fusion.heads == "mean":
        part: Floats = np.einsum("hqk,hq->qk", rows.exponentials, 1 / (heads * rows.totals))
        return part if fused is None else fused + part
    reduce = np.maximum if fusion.heads == "max" else np.minimum
    part = reduce.reduce(rows.weights, axis=0)
    return part if fused is None else np.asarray(reduce(fused, part))


def square_inputs(
    run: xr.DataTree, *, stack: str, layer: Sequence[int] | None, sample: int | Sequence[int] | None
) -> AttentionInputs:
    """q and k of every token, in consecutive layers: what lets information be followed from layer to layer.

    Raises
    ------
    DataError  q lacks tokens, or the layers have gaps; see also `attention_inputs`.
    """
    inputs = attention_inputs(run, stack=stack, layer=layer, sample=sample)
    if (kept := inputs.query.attrs.get("tokens")) != "all":
        raise DataError(
            f"{stack}/q holds the tokens {kept!r} only; information passes through all of them.",
            f"Capture every query: --sites '{stack}.*.q[all]' '{stack}.*.k[all]'.",
        )
    numbers = np.asarray(inputs.query["layer"].values)
    if (np.diff(numbers) != 1).any():
        raise DataError(
            f"layers {', '.join(map(str, numbers))} do not follow on one another.",
            "Information passes through every layer in between: capture or choose them all.",
        )
    return inputs


def transition_matrices(
    run: xr.DataTree,
    fusion: Fusion,
    *,
    sample: int,
    stack: str = "text",
    layer: Sequence[int] | None = None,
) -> xr.DataArray:
    """Transition probabilities (layer, query, key) of one sample, lazy; rows sum to 1.

    The labels of the tokens are coordinates with the prefixes ``query_`` and ``key_``.
    """
    inputs = square_inputs(run, stack=stack, layer=layer, sample=sample)
    axis = token_axis(inputs.query)
    query, key = inputs.query[inputs.query_name], inputs.key[inputs.key_name]
    blocks = align_blocks(query, key, max_bytes=_MAX_BYTES)
    columns = mask_columns(inputs.query)
    kernel = partial(_matrix_kernel, rules=inputs.rules, kv_of_head=inputs.kv_of_head, fusion=fusion)
    matrices = map_blocks(
        kernel, blocks, query_columns=columns, key_columns=columns, shape=(query.sizes[axis],)
    )
    labels = {
        f"{role}_{name}": (role, coord.data, coord.attrs)
        for role in ("query", "key")
        for name, coord in inputs.query.coords.items()
        if coord.dims == (axis,)
    }
    return xr.DataArray(
        matrices, dims=("layer", "query", "key"), coords={"layer": inputs.query["layer"], **labels}
    )


def _matrix_kernel(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Columns,
    key_columns: Columns,
    *,
    rules: Mapping[int, AttentionRule],
    kv_of_head: NDArray[np.int64],
    fusion: Fusion,
) -> Floats:
    matrix = np.zeros((len(query), len(key)), np.float32)
    walk = transition_rows(layer, query, key, query_columns, key_columns, rules[layer], kv_of_head, fusion)
    for piece, _, rows in walk:
        matrix[piece, : rows.shape[-1]] = rows
    return matrix
