"""Attention flow as maximum flow."""

from __future__ import annotations

import dask.array as da
import networkx as nx
import numpy as np
import pytest
from run_groups import stacked_attention, tokens_of
from synthetic_run import synthetic_run

from mechanistic.analysis.attention_flow import attention_flow, maximum_flows
from mechanistic.store.errors import DataError


def reference(matrices: np.ndarray, source: int) -> list[float]:
    """networkx on the same pipes."""
    pipes = nx.DiGraph()
    for level, query, key in zip(*np.nonzero(matrices), strict=True):
        capacity = float(matrices[level, query, key])
        pipes.add_edge((level + 1, query), (level, key), capacity=capacity)
    top = (len(matrices), source)
    sinks = [(0, key) for key in range(matrices.shape[-1])]
    return [nx.maximum_flow_value(pipes, top, sink) if sink in pipes else 0.0 for sink in sinks]


def test_maximum_flows__by_hand() -> None:
    # Token 1 reaches token 0 over either of two tokens below; the narrower pipe of each way counts.
    low = np.array([[1.0, 0.0], [0.3, 0.7]])
    high = np.array([[1.0, 0.0], [0.6, 0.4]])
    flows = maximum_flows(np.stack([low, high]), np.array([0, 1]))
    np.testing.assert_allclose(flows, [[1, 0], [0.6 + 0.3, 0.4]], atol=1e-6)


def test_attention_flow__networkx() -> None:
    run = synthetic_run(query_tokens="all", layers=(0, 1, 2))
    lazy = attention_flow(run, sample=2, query="last+@3")["attention_flow"]
    assert isinstance(lazy.data, da.Array)
    weights = stacked_attention(run, 2).mean(1)
    matrices = 0.5 * weights + 0.5 * np.eye(weights.shape[-1])
    last = int(np.flatnonzero(tokens_of(run, 2)["is_last_prompt"])[0])
    assert lazy["query_position"].values.tolist() == [3, last]
    expected = [reference(matrices, 3), reference(matrices, last)]
    np.testing.assert_allclose(lazy, expected, atol=1e-5)


def test_attention_flow__a_planted_hub_lets_most_through() -> None:
    run = synthetic_run(query_tokens="all", hub=3, layers=(0, 1))
    flow = attention_flow(run, sample=1, residual=0)["attention_flow"].compute()
    assert int(flow["key_position"][int(flow.argmax("key")[0])]) == 3


def test_attention_flow__errors() -> None:
    run = synthetic_run(query_tokens="all")
    with pytest.raises(DataError, match=r"has [\d,]+ edges; max_edges is 50\.\n  Use rollout_row"):
        attention_flow(run, sample=0, max_edges=50).compute()
    with pytest.raises(DataError, match="no token that is object"):
        attention_flow(run, sample=0, query="object")
    with pytest.raises(DataError, match="may look at no key"):
        maximum_flows(np.full((1, 2, 2), np.nan), np.array([0]))
