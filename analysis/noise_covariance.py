"""Covariance of the noise around means, from sums over blocks of rows, shrunk so that it can be inverted."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

Shrinkage = float | Literal["ledoit_wolf"]


class Scatter:
    """Sums over rows r less their group's mean: `products` = sum r r', `quartic` = sum |r|^4, `count`."""

    def __init__(self, features: int) -> None:
        self.products = np.zeros((features, features))
        self.quartic = 0.0
        self.count = 0

    def add(self, rows: NDArray[Any], code: NDArray[np.int64], means: NDArray[Any]) -> None:
        """Add rows (row, feature), given the means (group, feature) of their groups."""
        residual = rows - means.astype(rows.dtype, copy=False)[code]
        lengths = np.einsum("nf,nf->n", residual, residual, dtype=np.float64)
        self.products += residual.T @ residual
        self.quartic += float(lengths @ lengths)
        self.count += len(rows)


def ledoit_wolf_shrinkage(scatter: Scatter) -> float:
    """The share of the identity that minimises the expected squared error of the covariance, in [0, 1].

    References
    ----------
    Ledoit and Wolf (2004), Journal of Multivariate Analysis 88, 365.
    """
    width = len(scatter.products)
    squares = float(np.vdot(scatter.products, scatter.products)) / scatter.count**2
    mean = float(np.trace(scatter.products)) / scatter.count / width
    distance = squares - width * mean**2
    error = (scatter.quartic / scatter.count - squares) / scatter.count
    return 0.0 if error <= 0 else float(min(1.0, error / distance)) if distance > 0 else 1.0


def shrunk_covariance(scatter: Scatter, *, groups: int, shrinkage: Shrinkage) -> NDArray[np.float64]:
    """(1 - s) S + s tr(S)/d I, with S = products / (count - groups) and s given or Ledoit and Wolf's.

    Returns
    -------
    (feature, feature), float64, squared units of the rows; in the memory of the products, which are gone.

    Raises
    ------
    SpecificationError  `shrinkage` is neither "ledoit_wolf" nor between 0 and 1.
    """
    share = ledoit_wolf_shrinkage(scatter) if shrinkage == "ledoit_wolf" else shrinkage
    if isinstance(share, str) or not 0 <= share <= 1:
        raise SpecificationError(
            f"shrinkage is {shrinkage!r}.", "Give 'ledoit_wolf', or a share from 0 to 1."
        )
    covariance = scatter.products
    covariance /= scatter.count - groups
    mean = float(np.trace(covariance)) / len(covariance)
    covariance *= 1 - share
    covariance[np.diag_indices_from(covariance)] += share * mean
    return covariance


def whitener(covariance: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
    """W with W W' = covariance^-1, so that |x W|^2 = x' covariance^-1 x: the inverse Cholesky factor.

    Works in the memory of `covariance`, which is gone afterwards.

    Raises
    ------
    DataError  the covariance is not positive definite.
    """
    from scipy.linalg import lapack

    # The transpose of a symmetric matrix is itself, in the order of memory that LAPACK works on in place.
    factor, failed = lapack.dpotrf(covariance.T, lower=1, clean=1, overwrite_a=1)
    pivots = np.diag(factor)
    # A factor whose smallest pivot is rounding error inverts to noise.
    if failed or pivots.min() <= 1e-7 * pivots.max():
        raise DataError(
            f"the noise covariance of layer {layer} cannot be inverted: its {len(covariance)} features are "
            "not independent in these rows.",
            "Pass shrinkage='ledoit_wolf', or a share above 0, such as shrinkage=0.1.",
        )
    inverse, _ = lapack.dtrtri(factor, lower=1, overwrite_c=1)
    return np.asarray(inverse.T)
