"""Dissimilarity matrices on disk: written block by block, so that they may exceed memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import xarray as xr

from mechanistic.store.errors import DimensionError, OutputExistsError
from mechanistic.store.layout import compressors


def write_dissimilarity(rdm: xr.Dataset, path: str | Path) -> xr.Dataset:
    """Compute a lazy result of `representational_dissimilarity` into a Zarr store, and open it from there.

    Raises
    ------
    OutputExistsError  something is at `path`.
    """
    if Path(path).exists():
        raise OutputExistsError(
            f"{path} exists.", "Remove it, or name another path; open it with open_dissimilarity."
        )
    values = rdm["dissimilarity"]
    settings: dict[str, Any] = {"compressors": compressors(str(values.dtype))}
    if values.chunks is not None:
        settings["chunks"] = [max(sizes) for sizes in values.chunks]
    with warnings.catch_warnings():
        # Zarr v3 has no final specification of strings; what is written is what every reader writes.
        warnings.filterwarnings("ignore", "The data type .* does not have a Zarr V3 specification")
        rdm.to_zarr(path, mode="w-", zarr_format=3, consolidated=False, encoding={"dissimilarity": settings})
    return open_dissimilarity(path)


def open_dissimilarity(path: str | Path) -> xr.Dataset:
    """Open what `write_dissimilarity` wrote; lazy, in the blocks in which it was computed.

    Raises
    ------
    DimensionError  it holds no dissimilarity (condition, other).
    """
    dataset: xr.Dataset = xr.open_zarr(path, consolidated=False)
    if "dissimilarity" not in dataset or dataset["dissimilarity"].dims[-2:] != ("condition", "other"):
        raise DimensionError(
            f"{path} holds {', '.join(map(str, dataset.data_vars)) or 'nothing'}, no dissimilarity matrices.",
            "Give the path that representational_dissimilarity(..., save=) wrote.",
        )
    return dataset
