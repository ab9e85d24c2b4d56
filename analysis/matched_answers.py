"""Whether two runs answer the same."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError

from .matched_rows import MatchedSamples

AGREES = {"flag_values": [-1, 0, 1], "flag_meanings": "unknown no yes"}


def compare_answers(first: xr.DataTree, second: xr.DataTree, matched: MatchedSamples) -> xr.Dataset:
    """Agreement of the options' logits and of the generated answers, for each matched sample."""
    tables = [
        group(run, "samples").isel(sample=numbers)
        for run, numbers in zip((first, second), matched.numbers, strict=True)
    ]
    count = len(matched.names)
    agrees, apart = np.full(count, -1, np.int8), np.full(count, np.nan)
    if all("option_logits" in table.variables for table in tables):
        _same_options(tables, matched)
        agrees, apart = _logits(*(np.asarray(table["option_logits"].values, np.float64) for table in tables))
    same = np.ones(count, bool)
    if all("prediction" in table.variables for table in tables):
        same = np.array(
            [str(a) == str(b) for a, b in zip(*(t["prediction"].values for t in tables), strict=True)]
        )
    known = agrees >= 0
    return xr.Dataset(
        {
            "top_option_agrees": ("sample", agrees, AGREES),
            "option_logit_difference": ("sample", apart, {"units": "logit"}),
            "prediction_agrees": ("sample", same),
            "top_option_agreement": float(agrees[known].mean()) if known.any() else np.nan,
            "prediction_agreement": float(same.mean()),
            "n_sample": np.int64(count),
        },
        {"sample_id": ("sample", matched.names)},
    )


def _same_options(tables: list[xr.Dataset], matched: MatchedSamples) -> None:
    if not all("options" in table.variables for table in tables):
        return
    options = [
        [[str(option) for option in row if str(option)] for row in table["options"].values]
        for table in tables
    ]
    for name, first, second in zip(matched.names, *options, strict=True):
        if first != second:
            raise DataError(
                f"sample {name!r} has the options {', '.join(first)} in the first run and "
                f"{', '.join(second)} in the second.",
                "Compare runs of the same dataset.",
            )


def _logits(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    width = min(first.shape[1], second.shape[1])
    first, second = first[:, :width], second[:, :width]
    known = np.isfinite(first) & np.isfinite(second)
    usable = known.any(axis=1) & (np.isfinite(first) == np.isfinite(second)).all(axis=1)
    agrees = np.full(len(first), -1, np.int8)
    apart = np.full(len(first), np.nan)
    a, b = (np.where(known, values, -np.inf)[usable] for values in (first, second))
    agrees[usable] = a.argmax(axis=1) == b.argmax(axis=1)
    apart[usable] = np.where(known[usable], np.abs(first - second)[usable], 0).max(axis=1)
    return agrees, apart
