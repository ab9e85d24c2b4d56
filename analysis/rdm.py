"""Representational dissimilarity matrices: how far apart the conditions are, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import dask.array as da
import numpy as np
import xarray as xr

from mechanistic.store.errors import DataError, SpecificationError

from .conditions import Conditions, conditions_of, partition_codes
from .head_rows import split_heads
from .noise_covariance import Shrinkage
from .rdm_graph import RdmPlan, dissimilarity_blocks
from .rdm_store import write_dissimilarity
from .representation_rows import (
    MAX_BYTES,
    Representations,
    RowBlocks,
    layer_numbers,
    representation_rows,
    sample_numbers,
)

Metric = Literal["correlation", "euclidean", "mahalanobis", "crossnobis"]
Covariance = Literal["within", "total", "identity"]

_LONG_NAMES = {
    "correlation": "1 - Pearson correlation of the patterns",
    "euclidean": "squared Euclidean distance / features",
    "mahalanobis": "squared Mahalanobis distance / features",
    "crossnobis": "cross-validated squared Mahalanobis distance / features",
}


def representational_dissimilarity(
    data: Representations,
    *,
    metric: Metric = "correlation",
    conditions: str | Sequence[str] | None = None,
    partitions: str | int = 2,
    covariance: Covariance = "within",
    shrinkage: Shrinkage = "ledoit_wolf",
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
    save: str | Path | None = None,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Dissimilarity of every pair of conditions at each layer; lazy, in blocks of 2,048 x 2,048.

    With x the mean pattern of a condition, P features and noise covariance S::

        correlation   1 - r(x_i, x_j)
        euclidean     |x_i - x_j|^2 / P
        mahalanobis   (x_i - x_j)' S^-1 (x_i - x_j) / P
        crossnobis    mean over pairs of partitions m != n of (x_i - x_j)_m' S^-1 (x_i - x_j)_n / P

    Parameters
    ----------
    data
        A run; or an array (layer, row[, head], feature) with labels, see `representation_rows`.
    conditions
        Columns of samples/ or labels of the tokens whose rows are averaged, such as ``"relation"`` or
        ``["subject", "relation"]``; None makes each row a condition.
    partitions
        For crossnobis: a label, or a number of parts to which each condition's samples are dealt with `seed`.
    covariance
        What S is: the covariance ``"within"`` conditions, the ``"total"`` one of all rows, or the
        ``"identity"``.
    shrinkage
        Of S towards a multiple of the identity: Ledoit and Wolf's estimate, or a share from 0 to 1.
    site, tokens, layer
        Which rows of a run, see `select_tokens`.
    save
        A path that does not exist yet: every block is written there as it is computed, and the result is read
        from there. 20,000 conditions are 1.6 GB a layer.

    Returns
    -------
    dissimilarity (layer[, head], condition, other), float32 (float64 if the rows are): 0 on the diagonal;
        0 to 2 for correlation; squared units of the site for euclidean, none where S is estimated; never
        negative but for crossnobis, which is unbiased around 0.
    n_row (condition), int64: rows averaged. n_excluded (), int64: rows without a label.
        Labels of the conditions are coordinates, once for each axis (`relation`, `other_relation`).

    Raises
    ------
    MissingSiteError, SpecificationError
                       no such site, layer, token selection, metric, covariance or shrinkage.
    DimensionError     no such label, or the array is not (layer, row, feature).
    DataError          fewer than two conditions; a condition of one row where its noise is wanted, or without
                       a row in some partition; means beyond `max_bytes`; when computed, a value that is not
                       finite (by sample and layer), a covariance that cannot be inverted, a pattern that
                       is the same in all features.
    OutputExistsError  something is at `save`.

    References
    ----------
    Kriegeskorte, Mur and Bandettini (2008), Frontiers in Systems Neuroscience 2, 4. Walther et al. (2016),
    NeuroImage 137, 188. Ledoit and Wolf (2004), Journal of Multivariate Analysis 88, 365.
    """
    _check_names(metric, covariance)
    wanted = [conditions] if isinstance(conditions, str) else list(conditions or ())
    labels = [*wanted, *([partitions] if metric == "crossnobis" and isinstance(partitions, str) else [])]
    rows = representation_rows(data, site=site, tokens=tokens, layer=layer, labels=labels, heads=True)
    grouped = conditions_of(rows, conditions)
    if grouped.count < 2:
        raise DataError(
            f"there {'is one condition' if grouped.count else 'are no conditions'} in {rows.shape[1]} rows.",
            "A dissimilarity needs two: choose other conditions=, or capture more samples.",
        )
    plan = _plan(rows, grouped, metric, partitions, covariance, shrinkage, seed, max_bytes)
    values = rows.data if grouped.excluded == 0 else rows.data[:, grouped.rows]
    blocks = RowBlocks(values, max_bytes)
    result = split_heads(_labelled(dissimilarity_blocks(blocks, plan), rows, grouped, metric), rows)
    result.attrs |= {"site": site, "tokens": tokens or "all"} if isinstance(data, xr.DataTree) else {}
    result.attrs |= _choices(metric, partitions, covariance, shrinkage, seed)
    if save is not None:
        return write_dissimilarity(result, save)
    return result if rows.chunks is not None else result.compute()


def _check_names(metric: str, covariance: str) -> None:
    for value, allowed, name in (
        (metric, get_args(Metric), "metric"),
        (covariance, get_args(Covariance), "covariance"),
    ):
        if value not in allowed:
            raise SpecificationError(f"There is no {name} '{value}'.", f"Choose {', '.join(allowed)}.")


def _choices(
    metric: str, partitions: str | int, covariance: str, shrinkage: Shrinkage, seed: int
) -> dict[str, Any]:
    choices: dict[str, Any] = {"metric": metric}
    if metric in ("mahalanobis", "crossnobis"):
        choices |= {"covariance": covariance}
        choices |= {} if covariance == "identity" else {"shrinkage": shrinkage}
    if metric == "crossnobis":
        choices |= {"partitions": partitions}
        choices |= {} if isinstance(partitions, str) else {"seed": seed}
    return choices


def _plan(
    rows: xr.DataArray,
    grouped: Conditions,
    metric: Metric,
    partitions: str | int,
    covariance: Covariance,
    shrinkage: Shrinkage,
    seed: int,
    max_bytes: int,
) -> RdmPlan:
    """What every task needs to know, with the checks that can be made before anything is read."""
    partition, parts = np.zeros(len(grouped.rows), np.int64), 1
    if metric == "crossnobis":
        partition, parts = partition_codes(rows, grouped, partitions, seed)
    noisy = metric in ("mahalanobis", "crossnobis") and covariance != "identity"
    single = np.flatnonzero(grouped.sizes == 1)
    if noisy and covariance == "within" and single.size:
        raise DataError(
            f"condition {grouped.name(int(single[0]))!r} has one row, and so do {single.size - 1} others: "
            "nothing says how noisy it is.",
            "Name conditions= that have several rows, leave it out, or pass covariance='total'.",
        )
    averaged = not (grouped.trivial and parts == 1)
    needed = 2 * 4 * grouped.count * parts * rows.shape[2]
    if averaged and needed > max_bytes:
        raise DataError(
            f"the means of {grouped.count} conditions in {parts} partitions take {needed / 2**20:.3g} MiB a "
            f"layer, not {max_bytes / 2**20:.3g} MiB.",
            f"Pass max_bytes={needed}, or fewer conditions.",
        )
    noise = None
    if noisy:
        noise = grouped.code if covariance == "within" else np.zeros(len(grouped.rows), np.int64)
    names = np.asarray(grouped.labels["condition"])
    numbers, samples = tuple(layer_numbers(rows)), sample_numbers(rows)[grouped.rows]
    return RdmPlan(
        metric, numbers, samples, names, grouped.code, partition, parts, averaged, noise, shrinkage
    )


def _labelled(blocks: list[Any], rows: xr.DataArray, grouped: Conditions, metric: str) -> xr.Dataset:
    attrs = {
        "long_name": _LONG_NAMES[metric],
        "units": f"({rows.attrs.get('units', '1')})^2" if metric == "euclidean" else "1",
    }
    coords = {**grouped.coordinates(), **grouped.coordinates("other", "other_")}
    if "layer" in rows.coords:
        coords["layer"] = ("layer", np.asarray(rows["layer"].values))
    return xr.Dataset(
        {
            "dissimilarity": (("layer", "condition", "other"), da.stack(blocks), attrs),
            "n_row": ("condition", grouped.sizes, {"units": "row"}),
            "n_excluded": ((), np.int64(grouped.excluded), {"units": "row"}),
        },
        coords,
    )
