"""Attention weights that somebody already has: arrays, tensors or labelled patterns, checked before use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

# Half-precision rows sum to 1 within about 1e-3 (float16) or 4e-3 (bfloat16); scores or logits are far off.
ROW_SUM_TOLERANCE = 1e-2

PATTERN = "attention_pattern"


def plain_array(values: Any) -> NDArray[Any]:
    """A numpy array from a list, an array or a tensor of any device and dtype; imports no tensor library."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def attention_weights(values: Any, *, sinks: bool = False) -> NDArray[Any]:
    """Weights (..., key) as float32 or float64, or an error if they are not attention weights.

    Raises
    ------
    DimensionError  a scalar, or no keys.
    DataError       NaN, negative, or rows that do not sum to 1 within 1e-2; with `sinks` to more than that.
    """
    weights = plain_array(values)
    if weights.ndim == 0 or weights.shape[-1] == 0:
        raise DimensionError(
            f"attention weights need a last axis of keys; these have the shape {weights.shape}.",
            "Pass an array (..., query, key), such as one sample of the attentions that a model returns.",
        )
    if weights.dtype != np.float64:
        weights = weights.astype(np.float32)
    if np.isnan(weights).any():
        raise DataError(
            f"{np.isnan(weights).any(axis=-1).sum()} of {weights[..., 0].size} attention rows hold NaN.",
            "Leave out padded queries; elsewhere the model overflowed (run it in float32 or bfloat16).",
        )
    excess = weights.sum(axis=-1) - 1
    worst = float((excess if sinks else np.abs(excess)).max(initial=0))
    if worst > ROW_SUM_TOLERANCE or (weights < 0).any():
        raise DataError(
            f"attention rows must be weights that sum to 1; these are off by up to {worst:.3g}"
            f" (smallest value {weights.min():.3g}).",
            "Pass weights after the softmax, with the keys on the last axis and none of them cut off.",
        )
    return weights


def apply_to_pattern(
    pattern: xr.DataArray, kernel: Callable[[NDArray[Any]], NDArray[Any]], attrs: dict[str, Any]
) -> xr.DataArray:
    """Apply a row kernel, weights (..., key) -> (...), over the `key` dimension; lazy where the pattern is.

    Raises
    ------
    DimensionError  there is no `key` dimension, or it is cut into several chunks.
    """
    if "key" not in pattern.dims:
        raise DimensionError(
            f"a pattern has a dimension 'key'; this one has {', '.join(map(str, pattern.dims)) or 'none'}.",
            "Rename the dimension of the keys: pattern.rename(NAME='key').",
        )
    if len(pattern.variable.chunksizes.get("key", (1,))) > 1:
        raise DimensionError(
            f"'key' is cut into {len(pattern.variable.chunksizes['key'])} chunks; a row must be whole.",
            "Join them first: pattern.chunk(key=-1).",
        )
    computed: xr.DataArray = xr.apply_ufunc(
        partial(_checked, kernel=kernel, sinks=bool(pattern.attrs.get("sinks"))),
        pattern,
        input_core_dims=[["key"]],
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    return computed.assign_attrs(attrs)


def _checked(
    values: NDArray[Any], *, kernel: Callable[[NDArray[Any]], NDArray[Any]], sinks: bool
) -> NDArray[Any]:
    return kernel(attention_weights(values, sinks=sinks))


def pattern_of(dataset: xr.Dataset) -> xr.DataArray:
    """The variable attention_pattern (DimensionError if there is none)."""
    if PATTERN not in dataset.data_vars:
        raise DimensionError(
            f"these data have no '{PATTERN}'; they have {', '.join(map(str, dataset.data_vars)) or 'none'}.",
            "Pass a run, the result of attention_pattern(run, sample=0), or a plain array of weights.",
        )
    return dataset[PATTERN]
