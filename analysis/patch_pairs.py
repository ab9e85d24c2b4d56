"""Pairs of a run's samples, clean and corrupt: what is patched from one into the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError, DimensionError, SpecificationError
from mechanistic.store.schema import STATUS

from .minimal_pairs import minimal_pairs

DIRECTIONS = ("denoise", "noise")
Samples = Sequence[int] | Sequence[str] | None


@dataclass(frozen=True)
class SamplePairs:
    """Rows of samples/; `direction` says which of a pair is run and which it is patched from."""

    clean: NDArray[np.int64]
    corrupt: NDArray[np.int64]
    direction: str

    @property
    def base(self) -> NDArray[np.int64]:
        """The samples that are run."""
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def source(self) -> NDArray[np.int64]:
        """The samples that they are patched from."""
        return self.clean if self.direction == "denoise" else self.corrupt

    @property
    def samples(self) -> list[int]:
        """Every sample once."""
        return sorted({int(number) for number in np.concatenate([self.clean, self.corrupt])})

    def kept(self, keep: NDArray[np.bool_]) -> SamplePairs:
        """Some of the pairs."""
        return SamplePairs(self.clean[keep], self.corrupt[keep], self.direction)

    def __len__(self) -> int:
        return len(self.clean)


def sample_pairs(
    run: xr.DataTree, base: Samples, source: Samples, direction: str, limit: int | None
) -> SamplePairs:
    """Pairs by row or sample_id, one to one; without both, the run's minimal pairs.

    Raises
    ------
    SpecificationError    an unknown direction, or only one of base and source.
    DimensionError        a sample that does not exist, or unequal numbers of them.
    DataError             the run has no minimal pairs.
    """
    if direction not in DIRECTIONS:
        raise SpecificationError(
            f"There is no direction '{direction}'.",
            "'denoise' patches the clean run into the corrupt one, 'noise' the other way round.",
        )
    if (base is None) != (source is None):
        raise SpecificationError(
            "Only one of base and source is given.", "Give both, one to one, or neither for minimal pairs."
        )
    samples = group(run, "samples")
    if base is None or source is None:
        first, second = _minimal(samples)
    else:
        owns, others = (_rows(samples, each) for each in (base, source))
        if len(owns) != len(others) or not len(owns):
            raise DimensionError(
                f"There are {len(owns)} base samples and {len(others)} sources.", "Give them one to one."
            )
        first, second = (others, owns) if direction == "denoise" else (owns, others)
    return SamplePairs(first[:limit], second[:limit], direction)


def _minimal(samples: xr.Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    names = [
        name
        for name in ("group", "subject", "object", "answer", "options", "image_name", "status")
        if name in samples.variables
    ]
    held = samples[names].compute()
    good = np.flatnonzero(held["status"].values == STATUS["ok"])
    pairs = minimal_pairs(held.isel(sample=good)).pairs
    if not pairs:
        raise DataError(
            f"There is no minimal pair among the {len(good)} samples of this run: none of one group, subject "
            "and object have opposite answers.",
            "Name the pairs: base=[...], source=[...], rows or ids of samples/.",
        )
    rows = good[np.array(pairs)]
    return rows[:, 0], rows[:, 1]


def _rows(samples: xr.Dataset, chosen: Sequence[int] | Sequence[str]) -> NDArray[np.int64]:
    count = samples.sizes["sample"]
    if all(isinstance(each, str) for each in chosen):
        place = {str(name): row for row, name in enumerate(samples["sample_id"].values)}
        if unknown := [each for each in chosen if each not in place]:
            raise DimensionError(f"This run has no sample {unknown[0]!r}.", "See its samples/sample_id.")
        return np.array([place[str(each)] for each in chosen], np.int64)
    numbers = np.array([int(each) for each in chosen], np.int64)
    if ((numbers < 0) | (numbers >= count)).any():
        raise DimensionError(f"This run has no sample {numbers.max()}.", f"It has rows 0 to {count - 1}.")
    return numbers
