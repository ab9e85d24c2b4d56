"""The covariance of the noise around means, shrunk so that it can be inverted, from sums over blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

Shrinkage = float | Literal["ledoit_wolf"]


@dataclass(frozen=True)
class GroupSums:
    """Sums of rows by group, over some rows: total (group, feature), count (group)."""

    total: NDArray[np.float64]
    count: NDArray[np.int64]

    def means(self) -> NDArray[np.float64]:
        """(group, feature); NaN for a group without rows."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.count[:, None])


def add_group_sums(
    rows: NDArray[Any], code: NDArray[np.int64], groups: int, before: GroupSums | None = None
) -> GroupSums:
    """Add rows (row, feature) to the sums of their groups."""
    from scipy.sparse import csr_array

    present, local = np.unique(code, return_inverse=True)
    shape = (len(present), len(code))
    indicator = csr_array((np.ones(len(code)), (local, np.arange(len(code)))), shape=shape)
    total = np.zeros((groups, rows.shape[1])) if before is None else before.total.copy()
    count = np.zeros(groups, np.int64) if before is None else before.count.copy()
    total[present] += indicator @ rows.astype(np.float64)
    count[present] += np.bincount(local, minlength=len(present))
    return GroupSums(total, count)


@dataclass(frozen=True)
class Scatter:
    """Sums over rows r less their group's mean: products = sum r r', quartic = sum |r|^4, count of rows."""

    products: NDArray[np.float64]
    quartic: float
    count: int


def add_scatter(
    rows: NDArray[Any], code: NDArray[np.int64], means: NDArray[np.float64], before: Scatter | None = None
) -> Scatter:
    """Add rows (row, feature) to the scatter about the means of their groups."""
    residual = rows - means.astype(rows.dtype)[code]
    lengths = np.einsum("nf,nf->n", residual, residual, dtype=np.float64)
    products = (residual.T @ residual).astype(np.float64)
    if before is not None:
        products += before.products
    return Scatter(
        products,
        float(lengths @ lengths) + (before.quartic if before else 0.0),
        len(rows) + (before.count if before else 0),
    )


def ledoit_wolf_shrinkage(scatter: Scatter) -> float:
    """The share of the identity that minimises the expected squared error of the covariance, in [0, 1].

    References
    ----------
    Ledoit and Wolf (2004), Journal of Multivariate Analysis 88, 365.
    """
    width = len(scatter.products)
    covariance = scatter.products / scatter.count
    squares = float(np.vdot(covariance, covariance))
    mean = float(np.trace(covariance)) / width
    distance = squares - width * mean**2
    error = (scatter.quartic / scatter.count - squares) / scatter.count
    return 0.0 if error <= 0 else float(min(1.0, error / distance)) if distance > 0 else 1.0


def shrunk_covariance(scatter: Scatter, *, groups: int, shrinkage: Shrinkage) -> NDArray[np.float64]:
    """(1 - s) S + s tr(S)/d I, with S = products / (count - groups) and s given or Ledoit and Wolf's.

    Returns
    -------
    (feature, feature), float64, squared units of the rows.

    Raises
    ------
    SpecificationError  `shrinkage` is neither "ledoit_wolf" nor between 0 and 1.
    """
    share = ledoit_wolf_shrinkage(scatter) if shrinkage == "ledoit_wolf" else shrinkage
    if isinstance(share, str) or not 0 <= share <= 1:
        raise SpecificationError(
            f"shrinkage is {shrinkage!r}.", "Give 'ledoit_wolf', or a share from 0 to 1."
        )
    covariance = scatter.products * ((1 - share) / (scatter.count - groups))
    mean = float(np.trace(scatter.products)) / (scatter.count - groups) / len(covariance)
    covariance[np.diag_indices_from(covariance)] += share * mean
    return covariance


def whitener(covariance: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
    """W with W W' = covariance^-1, so that |x W|^2 = x' covariance^-1 x: the inverse Cholesky factor.

    Raises
    ------
    DataError  the covariance is not positive definite.
    """
    from scipy.linalg import LinAlgError, cholesky, lapack

    try:
        factor = cholesky(covariance, lower=True, check_finite=False)
    except LinAlgError:
        factor = None
    # A factor whose smallest pivot is rounding error inverts to noise.
    if factor is None or np.diag(factor).min() <= 1e-7 * np.diag(factor).max():
        raise DataError(
            f"the noise covariance of layer {layer} cannot be inverted: its {len(covariance)} features are not "
            "independent in so few rows.",
            "Pass shrinkage='ledoit_wolf', or a share above 0, such as shrinkage=0.1.",
        )
    inverse, _ = lapack.dtrtri(factor, lower=1, overwrite_c=1)
    return np.asarray(inverse.T)
