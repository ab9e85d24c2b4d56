"""What the logit lens reads after each layer, with confidence intervals, split by any label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import GREY, add_legend, new_axes, save
from .plot_layers import plot_layers
from .splits import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "answer_probability": "probability of the right answer (share)",
    "lens_correct": "right answer on top (share of samples)",
    "logit_gap": "right answer less best wrong one (logit)",
}


def plot_logit_lens(
    lens: xr.Dataset,
    *,
    variable: Literal["answer_probability", "lens_correct", "logit_gap"] = "answer_probability",
    by: str | None = None,
    title: str = "",
    ax: Axes | None = None,
    save_path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draw what `logit_lens` returned: mean over samples after each layer, with its 95 % interval.

    Dotted: what a guess among the options gives, or a gap of 0. Rows whose answer is not known are left out.

    Parameters
    ----------
    by
        A label of the rows, one line a value; columns of samples/ are attached by
        ``with_samples(lens, run, "correct")``.

    Raises
    ------
    DimensionError  no such variable or label, or no row has a known answer.
    """
    if variable not in _LABELS or variable not in lens:
        raise DimensionError(
            f"there is no '{variable}' of a logit lens; there are {', '.join(_LABELS)}.",
            "Pass what logit_lens returns, and one of these.",
        )
    axis = next(str(dim) for dim in lens[variable].dims if dim != "layer")
    values = lens[[variable]].compute()
    known = np.flatnonzero(values[variable].notnull().all("layer").values)
    if not known.size:
        raise DimensionError(
            f"none of {lens.sizes[axis]} rows has a known answer.",
            "The lens compares options whose first tokens differ; see samples/option_note.",
        )
    summary = summarize(values.isel({axis: known}), by=[] if by is None else by)
    figure, ax = new_axes(ax)
    plot_layers(summary, variable, by=by, label=_LABELS[variable], title=title, ax=ax)
    if variable == "logit_gap":
        ax.axhline(0, color=GREY, ls=":", lw=1.2)
    else:
        options = lens["option_logit"].isel(layer=0).notnull().sum("option").values[known]
        chance = float(np.mean(1 / options))
        line = ax.axhline(chance, color=GREY, ls=":", lw=1.2)
        ax.set_ylim(0, 1.02)
        add_legend(ax, {**_legend_lines(ax), f"guess among the options, {chance:.0%}": line})
    save(figure, save_path)
    return figure, ax


def _legend_lines(ax: Axes) -> dict[str, Any]:
    """What the legend has so far."""
    legend = ax.get_legend()
    if legend is None:
        return {}
    texts = [text.get_text() for text in legend.get_texts()]
    return dict(zip(texts, legend.legend_handles, strict=True))
