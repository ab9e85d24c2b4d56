"""The comparison of two runs as a page of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store import open_run, write_derived
from mechanistic.store.derived import check_writable

from .compare_runs import compare_runs

_HEAD = ("site", "layer", "max abs", "relative", "rms", "cosine", "least", "worst token")


def certify_runs(
    first: str | Path,
    second: str | Path,
    *,
    names: Sequence[str] | None = None,
    tolerance: float | None = None,
    store: bool = True,
) -> int:
    """Compare two runs, print the table, and store it with the first; 1 where `tolerance` is exceeded.

    Raises
    ------
    What `compare_runs` and, unless `store` is False, `write_derived` raise; before anything is computed.
    """
    runs = open_run(first), open_run(second)
    name = f"compare_{runs[1].attrs.get('run_id')}"
    if store:
        check_writable(first, name)
    comparison = compare_runs(*runs, names=names)
    print(format_certificate(comparison))
    if store:
        print(f"\nstored as {write_derived(first, name, comparison, replace=True)}")
    if tolerance is None:
        return 0
    worst = float(comparison["relative_difference"].max())
    said = "within" if worst <= tolerance else "above"
    print(f"largest relative difference {worst:.2e}, {said} the tolerance {tolerance:g}")
    return int(worst > tolerance)


def format_certificate(comparison: xr.Dataset) -> str:
    """What `compare_runs` returned: the runs, what they answer, and a row for each site and layer."""
    attrs = comparison.attrs
    lines = [f"first   {_about(attrs['first'])}", f"second  {_about(attrs['second'])}"]
    lines += [f"differs  {text}" for text in attrs["differing"]]
    lines += [
        f"only in the {which}: {', '.join(attrs[f'only_{which}'])}"
        for which in ("first", "second")
        if attrs[f"only_{which}"]
    ]
    return "\n".join([*lines, _answers(comparison), "", *_table(comparison)])


def _about(run: dict[str, Any]) -> str:
    said = [str(run[key]) for key in ("name", "dtype", "backend") if run.get(key)]
    return f"{', '.join(said)} (run {run.get('run_id')})"


def _answers(comparison: xr.Dataset) -> str:
    count, left = int(comparison["n_sample"]), int(comparison["n_excluded"])
    said = f"{count} samples" + (f", {left} left out: they failed in a run" if left else "")
    known = int((comparison["top_option_agrees"] >= 0).sum())
    if known:
        agree = int((comparison["top_option_agrees"] == 1).sum())
        apart = float(comparison["option_logit_difference"].max())
        said += f"; top option the same in {agree} of {known}, logits at most {apart:.3g} apart"
    same = int(comparison["prediction_agrees"].sum())
    return f"{said}; answers the same in {same} of {count}"


def _table(comparison: xr.Dataset) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    for name in comparison["site"].values:
        one = comparison.sel(site=name)
        for place, layer in enumerate(one["layer"].values):
            here = one.isel(layer=place)
            if np.isnan(here["max_difference"]):
                continue
            numbers = [float(here[key]) for key in ("max_difference", "relative_difference", "relative_rms")]
            cosines = [float(here[key]) for key in ("cosine", "cosine_min")]
            sample, position, text = (here[f"worst_{key}"].item() for key in ("sample", "position", "token"))
            rows.append(
                (
                    str(name),
                    str(layer),
                    *(f"{number:.2e}" for number in numbers),
                    *("-" if np.isnan(cosine) else f"{cosine:.7f}" for cosine in cosines),
                    f"{sample} @{position} {text!r}" if numbers[0] > 0 else "equal",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
