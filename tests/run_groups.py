"""Runs for tests with some groups exchanged, and dense references that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from synthetic_run import dense_attention

from mechanistic.store.schema import KIND


def with_groups(run: xr.DataTree, **groups: xr.Dataset) -> xr.DataTree:
    """The run with groups put in or replaced; a double underscore in a name is a slash."""
    named = {node.path: node.to_dataset(inherit=False) for node in run.subtree}
    named |= {f"/{name.replace('__', '/')}": dataset for name, dataset in groups.items()}
    return xr.DataTree.from_dict(named)


def without_groups(run: xr.DataTree, *paths: str) -> xr.DataTree:
    """The run without these groups."""
    named = {node.path: node.to_dataset(inherit=False) for node in run.subtree}
    return xr.DataTree.from_dict({path: held for path, held in named.items() if path.strip("/") not in paths})


def with_boxes(run: xr.DataTree, boxes: dict[str, Sequence[float]]) -> xr.DataTree:
    """The same boxes (x0, y0, x1, y1) for every sample."""
    samples = run["samples"].to_dataset(inherit=False)
    for name, edges in boxes.items():
        for edge, value in zip(("x0", "y0", "x1", "y1"), edges, strict=True):
            samples[f"{name}_{edge}"] = ("sample", np.full(samples.sizes["sample"], value, np.float32))
    return with_groups(run, samples=samples.chunk())


def tokens_of(run: xr.DataTree, sample: int) -> xr.Dataset:
    """The labels of one sample's tokens."""
    tokens = run["tokens/text"].to_dataset(inherit=False)
    return tokens.isel(token=np.flatnonzero(tokens["sample_index"].values == sample)).compute()


def stacked_attention(run: xr.DataTree, sample: int) -> np.ndarray[Any, Any]:
    """Dense attention (layer, head, query, key) of one sample, float64; NaN for queries not captured."""
    query = run["text/q"].to_dataset(inherit=False)
    held = query["position"].values[query["sample_index"].values == sample]
    rows = np.stack([dense_attention(run, sample, int(layer)) for layer in query["layer"].values])
    square = np.full((*rows.shape[:2], rows.shape[3], rows.shape[3]), np.nan)
    square[:, :, held] = rows
    return square


def is_image(run: xr.DataTree, sample: int) -> np.ndarray[Any, Any]:
    return np.asarray(tokens_of(run, sample)["kind"].values == KIND["image"])
