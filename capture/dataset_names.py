"""Datasets by name."""

from __future__ import annotations

from mechanistic.store.errors import DatasetError

from .dataset import Dataset
from .shapes import Shapes

NAMES = ("shapes",)


def open_dataset(name: str, *, num_samples: int | None = None, seed: int = 0) -> Dataset:
    """The dataset called `name`, its first `num_samples` samples or as many as it has by itself.

    Raises
    ------
    DatasetError    there is no dataset of this name.
    """
    if name == "shapes":
        return Shapes(seed=seed) if num_samples is None else Shapes(num_samples=num_samples, seed=seed)
    raise DatasetError(f"There is no dataset '{name}'.", f"The datasets are: {', '.join(NAMES)}.")
