"""The experiment of that name: which layers and places carry the answer from the image to the last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray as xr

from mechanistic.store import open_run

from .patching import patch
from .plot_patching import plot_patching

SWEEPS = {
    "resid_pre": "Clean residual stream into the corrupt run, by place",
    "z": "Clean heads into the corrupt run, at the last token",
}


def activation_patching(run: str | Path, output: str | Path, *, model: Any = None) -> list[Path]:
    """Patch minimal pairs by layer and role, and by layer and head; tables and maps under `output`.

    The results are also kept in the run, as derived/patch_resid_pre and derived/patch_z.

    Parameters
    ----------
    model
        What `patch` takes; absent, the model that the run names.

    Returns
    -------
    what was written.

    Raises
    ------
    as `patch` does.
    """
    written = []
    tree = open_run(run)
    loaded = _model(tree) if model is None else model
    for site, title in SWEEPS.items():
        positions = "last" if site == "z" else None
        result = patch(tree, loaded, sites=site, positions=positions, name=f"patch_{site}")
        names = ["recovered_mean", "recovered_mean_low", "recovered_mean_high"]
        table, figure = (Path(output) / f"patch_{site}.{kind}" for kind in ("csv", "png"))
        table.parent.mkdir(parents=True, exist_ok=True)
        result[names].to_dataframe()[names].to_csv(table)
        plot_patching(result, title=title, save_path=figure)
        written += [table, figure]
    return written


def _model(run: xr.DataTree) -> Any:
    from mechanistic.capture.models import load_model

    about = run.attrs["model"]
    return load_model(
        about["name"],
        dtype=about["dtype"],
        attention=about["attention"],
        revision=about["revision"] or None,
    )
