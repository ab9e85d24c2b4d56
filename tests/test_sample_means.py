"""Means of groups of rows: the definition, in any order, of rows that are many, large or missing."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from mechanistic.analysis.sample_means import Groups, mean_of_groups

SAMPLES = np.array([0, 700, 703, 1500])
ROWS = 1600


def _groups() -> tuple[Groups, list[np.ndarray]]:
    """Odd and even rows of each sample."""
    ends = np.append(SAMPLES[1:], ROWS)
    members = [
        np.arange(start + odd, end, 2) for start, end in zip(SAMPLES, ends, strict=True) for odd in (0, 1)
    ]
    start = np.cumsum([0, *map(len, members)])[:-1]
    return Groups(np.concatenate(members), start, SAMPLES), members


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_mean_of_groups__is_the_mean_of_each(dtype: str, place: int) -> None:
    values = (np.random.default_rng(0).standard_normal((2, 3, ROWS)) * 9).astype(dtype)
    values = np.moveaxis(values, -1, place)
    groups, members = _groups()
    expected = np.stack([values.take(rows, place).mean(place, np.float64) for rows in members], place)
    chunks = tuple(500 if axis == place else 1 for axis in range(3))
    lazy = mean_of_groups(da.from_array(values, chunks), place, groups)
    assert isinstance(lazy, da.Array)
    for computed in (mean_of_groups(values, place, groups), lazy.compute()):
        assert computed.dtype == (np.float64 if dtype == "float64" else np.float32)
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5)


def test_mean_of_groups__what_is_missing_stays_in_its_group() -> None:
    values = np.ones((ROWS, 2), np.float32)
    values[702, 1] = np.nan
    means = mean_of_groups(values, 0, _groups()[0])
    assert np.argwhere(np.isnan(means)).tolist() == [[2, 1]]


def test_mean_of_groups__sums_beyond_single_precision() -> None:
    values = np.full((ROWS, 2), 3e38, np.float32)
    np.testing.assert_allclose(mean_of_groups(values, 0, _groups()[0]), values[:8], rtol=1e-6)
