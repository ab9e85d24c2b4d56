"""One table that ranks attention heads by every criterion that a run allows, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DimensionError, SpecificationError

from .blocks import MAX_BYTES
from .head_criteria import head_criteria
from .splits import captured_samples

Floats = NDArray[np.float64]

# Resampled means are ranked in pieces of about this many numbers.
_PIECE = 1 << 22
_STATISTICS = ("importance", "importance_low", "importance_high", "rank", "rank_low", "rank_high")


def head_importance(
    run: xr.DataTree,
    *,
    criteria: Sequence[str] | None = None,
    clusters: str | None = "group",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Rank every head by each criterion of `head_criteria`, and by the mean of these ranks; lazy.

    Captured samples are resampled together for all criteria and heads, and heads are ranked again in each
    resample, so that the intervals of ranks say how sure an order is. One number for each sample, head and
    criterion is held in memory at once.

    Parameters
    ----------
    criteria
        Which, of those that `head_criteria` lists; None means all that can be had, and the attribute
        `left_out` then says why others cannot.
    clusters
        The column of samples/ whose equal values are drawn together, such as minimal-pair sets; an empty
        value is a cluster of its own. None draws single samples.

    Returns
    -------
    importance, importance_low, importance_high (criterion, layer, head), float64: the mean over samples, in
        the criterion's own units, larger for more important, and the interval of `level` of the resamples.
    rank, rank_low, rank_high (criterion, layer, head), float64: 1 for the most important; ties share a rank.
    mean_rank, mean_rank_low, mean_rank_high (layer, head), float64: over the criteria that speak of the head.
    n_sample (criterion), int64: samples with a value for some head; 0 for results without samples.
    Intervals are NaN for fewer than two clusters, and for results without samples; everything is for a head
    of which a criterion says nothing.

    Raises
    ------
    MissingSiteError    none of the criteria can be had.
    SpecificationError  an unknown criterion, a level that is not between 0 and 1, or no resamples.
    DimensionError      samples/ lacks the column of `clusters`.

    References
    ----------
    Efron and Tibshirani (1993), An Introduction to the Bootstrap; Hall and Miller (2009), Using the bootstrap
    to quantify the authority of an empirical ranking, Annals of Statistics 37, 3929.
    """
    if not 0 < level < 1 or resamples < 1:
        raise SpecificationError(
            f"level is {level}, with {resamples} resamples.", "Use such as level=0.95 and resamples=2000."
        )
    found, left_out = head_criteria(
        run, criteria=None if criteria is None else tuple(criteria), max_bytes=max_bytes
    )
    owner = _clusters(run, clusters)
    captured = captured_samples(run)
    values, owner = _aligned(found, len(owner)).isel(sample=captured), owner[captured]
    fixed = np.array(["sample" not in array.dims for array in found.values()])
    kernel = partial(ranked, clusters=owner, fixed=fixed, level=level, resamples=resamples, seed=seed)
    table, means = xr.apply_ufunc(
        kernel,
        values,
        input_core_dims=[["criterion", "sample", "layer", "head"]],
        output_core_dims=[["statistic", "criterion", "layer", "head"], ["bound", "layer", "head"]],
        dask="parallelized",
        output_dtypes=[np.float64, np.float64],
        dask_gufunc_kwargs={"output_sizes": {"statistic": len(_STATISTICS), "bound": 3}},
    )
    variables = {name: table.isel(statistic=place) for place, name in enumerate(_STATISTICS)}
    for place, name in enumerate(("mean_rank", "mean_rank_low", "mean_rank_high")):
        variables[name] = means.isel(bound=place).assign_attrs(units="1", long_name="mean rank over criteria")
    for name in _STATISTICS[3:]:
        variables[name].attrs |= {"units": "1", "long_name": "rank, 1 for the most important"}
    spoken = values.notnull().any(("layer", "head")).sum("sample")
    variables["n_sample"] = spoken.where(~xr.DataArray(fixed, dims="criterion"), 0).astype(np.int64)
    attrs: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed, "left_out": left_out}
    return xr.Dataset(variables, attrs=attrs)


def _aligned(found: dict[str, xr.DataArray], count: int) -> xr.DataArray:
    """All criteria as one array (criterion, sample, layer, head); NaN where one says nothing."""
    placed = []
    for array in found.values():
        if "sample" not in array.dims:
            placed.append(array.expand_dims(sample=count))
            continue
        owner = np.asarray(array["sample_index"].values)
        rows = array.drop_vars("sample_index").assign_coords(sample=owner)
        # A sample that was patched from several others counts once.
        rows = rows if len(np.unique(owner)) == len(owner) else rows.groupby("sample").mean()
        placed.append(rows.reindex(sample=np.arange(count)))
    bare = [array.drop_vars("sample", errors="ignore").drop_attrs() for array in placed]
    names = xr.DataArray(np.array(list(found), object), dims="criterion", name="criterion")
    joined = xr.concat(bare, names, join="outer", coords="minimal", compat="override")
    whole = joined.transpose("criterion", "sample", "layer", "head")
    return whole.chunk(-1) if whole.chunks is not None else whole


def _clusters(run: xr.DataTree, name: str | None) -> NDArray[np.int64]:
    """The cluster of each row of samples/."""
    samples = group(run, "samples")
    count = samples.sizes["sample"]
    if name is None:
        return np.arange(count)
    if name not in samples.variables or samples[name].dims != ("sample",):
        raise DimensionError(
            f"the samples of this run have no column '{name}' to draw together.",
            "Name one of samples/, or draw single samples with clusters=None.",
        )
    labels = [str(value) or f"\0{row}" for row, value in enumerate(samples[name].values)]
    return np.asarray(np.unique(np.array(labels, object), return_inverse=True)[1])


def ranked(
    values: NDArray[Any],
    clusters: NDArray[np.int64],
    fixed: NDArray[np.bool_],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Means and ranks of heads from values (criterion, sample, layer, head), with intervals.

    Returns
    -------
    (statistic, criterion, layer, head): mean, low, high, rank, low, high; and (3, layer, head): mean rank,
    low, high. `fixed` criteria have one value for all samples, and no interval.
    """
    shape = values.shape[2:]
    sums, sizes = _by_cluster(values.reshape(*values.shape[:2], -1), clusters)
    count = sizes.shape[1]
    mean = _means(np.ones((1, count)), sums, sizes)[:, 0]
    means = np.empty((len(sums), resamples, sums.shape[2]))
    rng = np.random.default_rng(seed)
    step = max(1, _PIECE // count)
    for start in range(0, resamples, step):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        means[:, start : start + len(draws)] = _means(draws, sums, sizes)
    rank, ranks = _ranks(mean), _ranks(means)
    table = [mean, *_quantiles(means, level), rank, *_quantiles(ranks, level)]
    result = np.stack(table).reshape(len(_STATISTICS), len(sums), *shape)
    overall = np.stack([_known_mean(rank), *_quantiles(_known_mean(ranks), level)]).reshape(3, *shape)
    for bound in (1, 2, 4, 5):
        result[bound, fixed if count > 1 else ...] = np.nan
    if count < 2:
        overall[1:] = np.nan
    return result, overall


def _by_cluster(values: NDArray[Any], clusters: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Sums and numbers (criterion, cluster, head) of the values that there are."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    ordered = values[:, order].astype(np.float64)
    known = ~np.isnan(ordered)
    sums = np.add.reduceat(np.where(known, ordered, 0), starts, axis=1)
    return sums, np.add.reduceat(known.astype(np.float64), starts, axis=1)


def _means(draws: NDArray[Any], sums: Floats, sizes: Floats) -> Floats:
    """(criterion, resample, head); NaN where a resample has no value."""
    weights = draws.astype(np.float64)
    number = weights @ sizes
    return np.where(number > 0, weights @ sums / np.where(number > 0, number, 1), np.nan)


def _ranks(means: Floats) -> Floats:
    """Ranks from 1, downwards from the largest, over the last axis; NaN stays NaN and takes no rank."""
    from scipy.stats import rankdata

    known = ~np.isnan(means)
    # What is not known sinks to the bottom, where it moves nobody's rank.
    return np.where(known, rankdata(np.where(known, -means, np.inf), axis=-1), np.nan)


def _known_mean(ranks: Floats) -> Floats:
    """Mean over criteria, of those that speak of the head."""
    known = ~np.isnan(ranks)
    number = known.sum(axis=0)
    return np.where(number > 0, np.where(known, ranks, 0).sum(axis=0) / np.maximum(number, 1), np.nan)


def _quantiles(values: Floats, level: float) -> Floats:
    """Both ends of the interval over resamples, the last axis but one; NaN for a head never spoken of."""
    ends = [0.5 - level / 2, 0.5 + level / 2]
    known = ~np.isnan(values)
    if known.all():
        return np.asarray(np.quantile(values, ends, axis=-2))
    spoken = np.asarray(known.any(axis=-2))
    filled = np.where(spoken[..., None, :], values, 0)
    return np.where(spoken, np.nanquantile(filled, ends, axis=-2), np.nan)
