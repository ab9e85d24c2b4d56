"""How well any model could explain dissimilarities, given how much repeated measurements of them differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError

from .rdm_inference import Inference, check_options, prepared_matrix
from .rdm_similarity import Floats, Method, midranks, prepare, similarity, square, upper


def noise_ceiling(rdms: xr.Dataset | xr.DataArray, *, over: str, method: Method = "spearman") -> xr.Dataset:
    """How well any model could do, given how much repeated matrices of the same conditions differ.

    Each matrix is compared with the mean of all of them (upper bound), and of all others (lower bound), after
    what the method compares (ranks, for Spearman and Kendall) has been averaged.

    Parameters
    ----------
    over
        The dimension of the repetitions: seeds, paraphrases, halves of the data, models.

    Returns
    -------
    ceiling_low, ceiling_high (the remaining dimensions), float64, in units of the similarity.
    n_repetition (), int64.

    Raises
    ------
    SpecificationError  no such method.
    DimensionError      there is no such dimension beside condition and other.
    DataError           fewer than two repetitions, a value that is not finite, pairs that are all alike.

    References
    ----------
    Nili et al. (2014), PLoS Computational Biology 10, e1003553.
    """
    check_options(Inference(method))
    rdms = rdms if isinstance(rdms, xr.Dataset) else rdms.to_dataset(name="dissimilarity")
    values = rdms.get("dissimilarity")
    needed = {over, "condition", "other"}
    if values is None or len(needed) < 3 or not needed <= {*values.dims}:
        raise DimensionError(
            f"a noise ceiling needs dissimilarity ({over}, condition, other).",
            "Stack repetitions: xr.concat([rdm_a, rdm_b], 'repetition').",
        )
    if rdms.sizes[over] < 2:
        raise DataError(f"there is one {over} only.", "A noise ceiling needs at least two repetitions.")
    bounds = xr.apply_ufunc(
        _ceiling,
        values.chunk({over: -1, "condition": -1, "other": -1}) if values.chunks is not None else values,
        kwargs={"method": method, "over": over},
        input_core_dims=[[over, "condition", "other"]],
        output_core_dims=[["bound"]],
        vectorize=True,
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"bound": 2}},
    )
    return xr.Dataset(
        {
            "ceiling_low": bounds.isel(bound=0).assign_attrs(units="1"),
            "ceiling_high": bounds.isel(bound=1).assign_attrs(units="1"),
            "n_repetition": ((), np.int64(rdms.sizes[over])),
        },
        attrs={"method": method, "over": over},
    )


def _ceiling(matrices: NDArray[Any], method: Method, over: str) -> Floats:
    """Lower and upper bound from matrices (repetition, condition, other)."""
    names = [f"{over} {place}" for place in range(len(matrices))]
    prepared = [prepared_matrix(*each, method)[1] for each in zip(matrices, names, strict=True)]
    scaled = np.stack([_scaled(upper(matrix), method) for matrix in matrices])
    total = scaled.sum(axis=0)
    everyone = prepare(square(total), method)
    bounds = [
        (similarity(prepare(square(total - own), method), each, method), similarity(everyone, each, method))
        for own, each in zip(scaled, prepared, strict=True)
    ]
    return np.asarray(np.mean(bounds, axis=0))


def _scaled(pairs: Floats, method: Method) -> Floats:
    """Pairs as they are averaged: on the scale that the method compares."""
    if method in ("spearman", "kendall"):
        return midranks(pairs)
    centred = pairs - pairs.mean() if method == "correlation" else pairs
    return np.asarray(centred / np.sqrt(np.mean(centred**2)))
