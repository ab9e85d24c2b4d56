"""Attention as a network of pipes: the most that can flow from an input token to a token at the top."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .attention_transitions import Fusion, transition_matrices
from .token_selection import token_mask

# The solver counts in int32, and a pipe filled in both directions must still fit.
_UNIT = 1 << 29


def attention_flow(
    run: xr.DataTree,
    *,
    sample: int,
    query: str = "last",
    head_fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    stack: str = "text",
    layer: Sequence[int] | None = None,
    max_edges: int = 100_000,
) -> xr.Dataset:
    """Attention flow, the maximum flow from each token above the top layer to each token below the lowest.

    Node (l, i) is token i at the input of layer l; the pipe from (l + 1, i) to (l, j) has the capacity
    A_l[i, j], with A_l as in `attention_rollout`. For small models: each query and key is a flow problem.

    Parameters
    ----------
    query
        Tokens at the top, such as ``"last"``; see `select_tokens`.
    head_fusion, residual, discard, layer
        As in `attention_rollout`.
    max_edges
        The largest network tried; its solution takes seconds a query token.

    Returns
    -------
    attention_flow (query, key), float32, 0 to 1; the capacity of the pipes out of a query is 1 in all.
        Flows to different keys share pipes, so they do not sum to 1. 0 where no path leads.
        Under a causal mask more paths lead to early tokens, so that flow falls with position: compare keys
        with `attention_rollout` beside it.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           q or k lacks tokens, layers have gaps, or (when computed) there are too many edges.
    SpecificationError  an unknown fusion, a share out of its range, or a selection that does not parse.

    References
    ----------
    Abnar and Zuidema (2020), Quantifying Attention Flow in Transformers.
    """
    fusion = Fusion(head_fusion, residual, discard)
    matrices = transition_matrices(run, fusion, sample=sample, stack=stack, layer=layer)
    labels = {
        str(name).removeprefix("query_"): ("token", coord.data)
        for name, coord in matrices.coords.items()
        if coord.dims == ("query",)
    }
    rows = np.flatnonzero(token_mask(xr.Dataset(coords=labels), query))
    if not rows.size:
        raise DataError(
            f"sample {sample} has no token that is {query}.", "Choose one that it has, such as query='last'."
        )
    flow: xr.DataArray = xr.apply_ufunc(
        partial(maximum_flows, sources=rows, max_edges=max_edges),
        matrices.chunk(layer=-1),
        input_core_dims=[["layer", "query", "key"]],
        output_core_dims=[["top", "key"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"top": rows.size}},
    )
    tops = {name: coord[rows] for name, coord in matrices.coords.items() if coord.dims == ("query",)}
    flow = flow.rename(top="query").assign_coords(tops)
    flow = flow.assign_attrs(units="1", long_name="attention flow")
    return flow.to_dataset(name="attention_flow").assign_attrs(sample=int(sample), stack=stack)


def maximum_flows(
    matrices: NDArray[Any], sources: NDArray[np.int64], *, max_edges: int = 100_000
) -> NDArray[np.float32]:
    """Maximum flow (source, key) through transitions (layer, query, key) from each source token to each key.

    Raises
    ------
    DataError  there are more than `max_edges` edges, or the transitions hold NaN.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    layers, tokens, _ = matrices.shape
    if np.isnan(matrices).any():
        raise DataError(
            "a token of this sample may look at no key, so nothing flows through it.",
            "Attention flow is defined where every row sums to 1.",
        )
    level, query, key = np.nonzero(matrices)
    if level.size > max_edges:
        raise DataError(
            f"the network of this sample has {level.size:,} edges; max_edges is {max_edges:,}.",
            "Use rollout_row, which costs one pass, or fewer layers, or raise max_edges and wait.",
        )
    capacity = np.rint(matrices[level, query, key].astype(np.float64) * _UNIT).astype(np.int32)
    nodes = (layers + 1) * tokens
    pipes = csr_array((capacity, ((level + 1) * tokens + query, level * tokens + key)), shape=(nodes, nodes))
    top = layers * tokens
    flows = np.empty((len(sources), tokens), np.float32)
    for place, row in enumerate(sources):
        for sink in range(tokens):
            flows[place, sink] = maximum_flow(pipes, top + int(row), sink).flow_value / _UNIT
    return flows
