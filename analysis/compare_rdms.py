"""Compare dissimilarity matrices: layers with hypotheses, with other layers, with those of another run."""

from __future__ import annotations

from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed

from mechanistic.store.errors import DataError, DimensionError

from .rdm_inference import STATISTICS, Inference, check_options, compare_matrices
from .rdm_similarity import Method
from .representation_rows import MAX_BYTES, UnreadBlock
from .splits import row_labels

_LONG_NAMES = {
    "spearman": "Spearman correlation of dissimilarities",
    "kendall": "Kendall's tau-a of dissimilarities",
    "cosine": "cosine of dissimilarities",
    "correlation": "Pearson correlation of dissimilarities",
    "whitened": "cosine of whitened dissimilarities",
}


def compare_rdms(
    first: xr.Dataset | xr.DataArray,
    second: xr.Dataset | xr.DataArray | None = None,
    *,
    method: Method = "spearman",
    permutations: int = 0,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Similarity of each matrix of `first` with each of `second`, over the pairs of conditions; lazy.

    ``"whitened"`` is the cosine after whitening by the covariance that squared distances have when patterns
    are estimated independently (rsatoolbox's cosine_cov): for euclidean, mahalanobis and crossnobis.

    Parameters
    ----------
    first, second
        `dissimilarity` (layer[, head] or model, condition, other), from `representational_dissimilarity` or
        `model_dissimilarity`, over the same conditions in the same order. Without a second, the first.
    permutations
        Times that the conditions of the second matrix are put in random order for the p value.
    resamples
        Times that conditions are drawn again, with replacement, for the interval; copies of one condition are
        no pair.

    Returns
    -------
    similarity (layer[, head], model), float64, -1 to 1. A second dimension of the same name becomes
        other_layer.
    p_value, float64: share of permutations, counting the given order as one, that reach the similarity
        (one-sided). Only with permutations.
    similarity_low, similarity_high, float64: percentiles that hold `level` of the resamples; those in which a
        matrix is constant do not count. Only with resamples.
    n_condition (), int64.

    Raises
    ------
    SpecificationError  no such method, a negative number of repetitions, a level not between 0 and 1.
    DimensionError      not (..., condition, other).
    DataError           other conditions, fewer than three, more than `max_bytes` allows; when computed, a
                        value that is not finite or a matrix whose pairs are all alike.

    References
    ----------
    Kriegeskorte, Mur and Bandettini (2008), Frontiers in Systems Neuroscience 2, 4. Nili et al. (2014), PLoS
    Computational Biology 10, e1003553. Diedrichsen et al. (2021), Neurons, Behavior, Data analysis, and
    Theory 5.
    """
    inference = Inference(method, permutations, resamples, level, seed)
    check_options(inference)
    left = _matrices(first)
    right = left if second is None else _matrices(second)
    _check_conditions(left, right, max_bytes)
    right = right.rename({dim: f"other_{dim}" for dim in right.dims[:-2] if dim in left.dims})
    wanted = [True, permutations > 0, resamples > 0, resamples > 0]
    table = _table(left, right, inference, max_bytes)
    dims = (*left.dims[:-2], *right.dims[:-2])
    variables = {
        name: (dims, table[..., place], {"units": "1"})
        for place, name in enumerate(STATISTICS)
        if wanted[place]
    }
    coords = {dim: own[dim].values for own in (left, right) for dim in own.dims[:-2] if dim in own.coords}
    result = xr.Dataset(variables, coords)
    result["n_condition"] = ((), np.int64(left.sizes["condition"]), {"units": "condition"})
    result["similarity"].attrs["long_name"] = _LONG_NAMES[method]
    result.attrs = {"method": method, "permutations": permutations, "resamples": resamples, "seed": seed}
    lazy = left.chunks is not None or right.chunks is not None
    return result if lazy else result.compute()


def _matrices(rdm: xr.Dataset | xr.DataArray) -> xr.DataArray:
    rdm = rdm if isinstance(rdm, xr.Dataset) else rdm.to_dataset(name="dissimilarity")
    values = rdm.get("dissimilarity")
    if values is None or values.ndim < 2 or values.dims[-2:] != ("condition", "other"):
        held = ", ".join(
            f"{name} ({', '.join(map(str, array.dims))})" for name, array in rdm.data_vars.items()
        )
        raise DimensionError(
            f"comparing needs dissimilarity (layer, condition, other); there is {held or 'nothing'}.",
            "Pass what representational_dissimilarity or model_dissimilarity returns.",
        )
    return values if values.ndim > 2 else values.expand_dims("matrix")


def _check_conditions(left: xr.DataArray, right: xr.DataArray, max_bytes: int) -> None:
    counts = [array.sizes["condition"] for array in (left, right)]
    labels = [row_labels(each["condition"]) if "condition" in each.coords else None for each in (left, right)]
    if counts[0] != counts[1]:
        raise DataError(f"the matrices have {counts[0]} and {counts[1]} conditions.", _SAME)
    if labels[0] is not None and labels[1] is not None:
        differ = np.flatnonzero(labels[0].astype(str) != labels[1].astype(str))
        if differ.size:
            at = int(differ[0])
            raise DataError(
                f"the matrices differ in {differ.size} conditions: number {at} is {labels[0][at]!s} in the "
                f"first, {labels[1][at]!s} in the second.",
                _SAME,
            )
    if counts[0] < 3:
        raise DataError(
            f"{counts[0]} conditions make {counts[0] * (counts[0] - 1) // 2} pairs, too few to compare.",
            "Use at least three conditions, better dozens.",
        )
    if _held(counts[0]) > max_bytes:
        raise DataError(
            f"comparing {counts[0]} conditions needs {_held(counts[0]) >> 20} MiB, more than max_bytes.",
            f"Pass max_bytes={_held(counts[0])}, or a random part: rdm.isel(condition=part, other=part).",
        )


_SAME = "Select the same conditions in the same order: rdm.sel(condition=names, other=names)."


def _held(count: int) -> int:
    """Bytes for two prepared matrices and what preparing one takes."""
    return 6 * 8 * count**2


def _table(left: xr.DataArray, right: xr.DataArray, inference: Inference, max_bytes: int) -> Any:
    """A lazy array (*first, *second, statistic): a task for as many matrices of the first as may be held."""
    group = max(1, max_bytes // (2 * _held(left.sizes["condition"])))
    firsts, seconds = _sources(left, max_bytes), _sources(right, max_bytes)
    names = [_names(array) for array in (left, right)]
    rows = []
    for start in range(0, len(firsts), group):
        some = slice(start, start + group)
        shape = (len(firsts[some]), len(STATISTICS))
        tasks = [
            delayed(compare_matrices)(firsts[some], names[0][some], second, name, inference)
            for second, name in zip(seconds, names[1], strict=True)
        ]
        rows.append(da.stack([da.from_delayed(task, shape, np.float64) for task in tasks], axis=1))
    return da.concatenate(rows).reshape(*left.shape[:-2], *right.shape[:-2], len(STATISTICS))


def _sources(matrices: xr.DataArray, max_bytes: int) -> list[Any]:
    """Each matrix for a task: shared between tasks if all of them may be held, else read again by each."""
    data = da.asarray(matrices.data)
    if data.nbytes <= max_bytes:
        leading = tuple(range(data.ndim - 2))
        whole = data.rechunk({**dict.fromkeys(leading, 1), data.ndim - 2: -1, data.ndim - 1: -1}).to_delayed()
        return [delayed(np.squeeze)(block, axis=leading) for block in whole.ravel()]
    return [UnreadBlock(data[place]) for place in np.ndindex(*data.shape[:-2])]


def _names(matrices: xr.DataArray) -> list[str]:
    values = [
        [f"{str(dim).removeprefix('other_')} {value}" for value in matrices[dim].values]
        for dim in matrices.dims[:-2]
    ]
    return [", ".join(parts) for parts in product(*values)]
