"""Whether an attribution is spread out or sits on a few features: Gini, Hoyer, or features for most of it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from mechanistic.store.errors import DataError, DimensionError, SpecificationError

from .attention_sparsity import measured_sparsity
from .attention_weights import plain_array
from .attribution_table import attribution_of

Measure = Literal["gini", "hoyer", "feature_share"]

_MEANINGS = {
    "gini": "Gini index of the attribution's magnitudes",
    "hoyer": "Hoyer sparsity of the attribution's magnitudes",
    "feature_share": "share of the features that hold most of the attribution",
}


@overload
def attribution_sparsity(
    attribution: xr.Dataset | xr.DataArray, *, measure: Measure = "gini", mass: float = 0.9
) -> xr.Dataset: ...
@overload
def attribution_sparsity(
    attribution: ArrayLike, *, measure: Measure = "gini", mass: float = 0.9
) -> NDArray[Any]: ...
def attribution_sparsity(attribution: Any, *, measure: Measure = "gini", mass: float = 0.9) -> Any:
    """Sparsity of the magnitudes of an attribution over its n features, p_j = |a_j| / sum_k |a_k|.

    With p sorted downwards, p_1 >= p_2 >= ... >= p_n:
    gini = 1 - 2 sum_j p_j (j - 1/2) / n;
    hoyer = (sqrt(n) - 1 / |p|_2) / (sqrt(n) - 1);
    feature_share = (smallest m with p_1 + ... + p_m >= `mass`) / n, which falls as it gets sparser.

    Parameters
    ----------
    attribution
        What `integrated_gradients`, `gradcam` or `attention_relevancy` returns, a DataArray of one of them
        (features on the last dimension), or a plain array or tensor (..., feature), for which a numpy array
        (...) comes back.

    Returns
    -------
    attribution_gini, attribution_hoyer or attribution_feature_share (..., sample), float32, 0 to 1; of each
        sample by itself where the features say which sample they are of, otherwise (...). All features alike
        have 0, 0 and about `mass`; everything on one has 1 - 1/n, 1 and 1/n. NaN where an attribution is 0
        everywhere; hoyer also of a single feature.

    Raises
    ------
    SpecificationError  another measure, or a mass that is not above 0 and below 1.
    DataError           NaN or infinite values.
    DimensionError      no features, or a Dataset without an attribution.

    References
    ----------
    Hurley and Rickard (2009), IEEE Transactions on Information Theory 55, 4723; Hoyer (2004), Journal of
    Machine Learning Research 5, 1457.
    """
    if measure not in _MEANINGS:
        raise SpecificationError(
            f"There is no measure of sparsity {measure!r}.", f"The measures are {', '.join(_MEANINGS)}."
        )
    if not 0 < mass < 1:
        raise SpecificationError(f"mass is {mass}.", "Give a share of the attribution, such as mass=0.9.")
    kernel = partial(_sparsity, measure=measure, mass=mass)
    if isinstance(attribution, xr.Dataset):
        attribution = attribution_of(attribution)
    if not isinstance(attribution, xr.DataArray):
        return kernel(plain_array(attribution))
    attrs: dict[str, Any] = {"units": "1", "long_name": _MEANINGS[measure]}
    if measure == "feature_share":
        attrs["mass"] = mass
    return _by_sample(attribution, kernel).assign_attrs(attrs).to_dataset(name=f"attribution_{measure}")


def _by_sample(attribution: xr.DataArray, kernel: Any) -> xr.DataArray:
    if not attribution.ndim:
        raise DimensionError("one number has no features.", "Pass an attribution with a dimension of them.")
    feature = attribution.dims[-1]
    owner = attribution.coords.get("sample_index")
    if owner is None or owner.dims != (feature,):
        return _applied(attribution, feature, kernel)
    samples = np.unique(owner.values)
    parts = [_applied(attribution.isel({feature: owner.values == one}), feature, kernel) for one in samples]
    joined: xr.DataArray = xr.concat(parts, "sample", coords="minimal", compat="override")
    return joined.assign_coords(sample_index=("sample", samples)).transpose(..., "sample")


def _applied(attribution: xr.DataArray, feature: Any, kernel: Any) -> xr.DataArray:
    whole = attribution if attribution.chunks is None else attribution.chunk({feature: -1})
    computed: xr.DataArray = xr.apply_ufunc(
        kernel,
        whole.reset_coords(drop=True),
        input_core_dims=[[feature]],
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    return computed


def _sparsity(values: NDArray[Any], measure: Measure, mass: float) -> NDArray[Any]:
    """(..., feature) -> (...)."""
    if values.ndim == 0 or values.shape[-1] == 0:
        raise DimensionError(
            f"an attribution needs a last axis of features; this has the shape {values.shape}.",
            "Pass an array (..., feature), such as one value a patch.",
        )
    size = np.abs(values.astype(np.float64))
    if not np.isfinite(size).all():
        raise DataError(
            f"{(~np.isfinite(size)).sum()} of {size.size} values are NaN or infinite.",
            "Leave out features that have no attribution, such as what lies beyond the edge of an image.",
        )
    total = size.sum(axis=-1, keepdims=True)
    known: Literal["gini", "hoyer", "key_share"] = "key_share" if measure == "feature_share" else measure
    shares = size / np.where(total > 0, total, 1)
    found = measured_sparsity(shares, np.full(size.shape[:-1], size.shape[-1]), known, mass)
    return np.where(total[..., 0] > 0, found, np.nan).astype(np.float32)
