"""What can be said of each attention head from a run: one number for each sample, layer and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from mechanistic.store import group
from mechanistic.store.errors import DataError, DimensionError, MissingSiteError, SpecificationError

from .attention_boxes import attention_boxes
from .blocks import MAX_BYTES
from .logit_attribution import logit_attribution
from .two_hop import two_hop

PATCHING = "recovered"

# Dimensions along which a patching result has one entry for each pair of samples.
_PAIRS = ("sample", "pair")

Criterion = Callable[[xr.DataTree, int], xr.DataArray]


def head_criteria(
    run: xr.DataTree, *, criteria: tuple[str, ...] | None = None, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, xr.DataArray], dict[str, str]]:
    """Every criterion that the run allows, lazily, and why the others are left out.

    box_auroc: AUROC of the last token's attention for the subject's and the object's box, averaged;
    two_hop_share: share of the last token's attention to the image that goes through text tokens;
    logit_attribution: what the head writes into the right answer's logit, against the other options;
    patching_NAME: the `recovered` share of derived/NAME, where that has a layer and a head.

    Parameters
    ----------
    criteria
        Which; None means all that can be had.

    Returns
    -------
    {name: DataArray (layer, sample, head), float32}; sample_index says which sample a row is. A patching
        result without samples has (layer, head).
    {name: why it is left out}; empty if `criteria` is given.

    Raises
    ------
    SpecificationError  a criterion that does not exist.
    MissingSiteError    none can be had; or what a criterion asked for raises.
    """
    known: dict[str, Criterion] = {**_CRITERIA, **_patching(run)}
    if criteria is not None and (unknown := [name for name in criteria if name not in known]):
        raise SpecificationError(
            f"There is no criterion {', '.join(unknown)} for the heads of this run.",
            f"There are {', '.join(known)}; patching results add theirs.",
        )
    found: dict[str, xr.DataArray] = {}
    left_out: dict[str, str] = {}
    for name in known if criteria is None else criteria:
        try:
            found[name] = known[name](run, max_bytes)
        except (MissingSiteError, DimensionError, DataError) as cause:
            if criteria is not None:
                raise
            left_out[name] = cause.what
    if not found:
        raise MissingSiteError(
            "nothing in this run says how important a head is: " + " ".join(dict.fromkeys(left_out.values())),
            "Capture --sites 'text.*.q[text]' 'text.*.k[all]', or z[last] with resid_post[last].",
        )
    return found, left_out


def _box_auroc(run: xr.DataTree, max_bytes: int) -> xr.DataArray:
    boxes = attention_boxes(run, tokens="last", max_bytes=max_bytes)
    both = (boxes["auroc_subject"] + boxes["auroc_object"]) / 2
    rows = both.rename({str(boxes["sample_index"].dims[0]): "sample"})
    kept = {"layer", "head", "sample_index"}
    return rows.drop_vars([name for name in rows.coords if name not in kept])


def _two_hop_share(run: xr.DataTree, max_bytes: int) -> xr.DataArray:
    return two_hop(run, max_bytes=max_bytes)["share"]


def _logit_attribution(run: xr.DataTree, max_bytes: int) -> xr.DataArray:
    return logit_attribution(run)["logit_attribution"]


_CRITERIA: Mapping[str, Criterion] = {
    "box_auroc": _box_auroc,
    "two_hop_share": _two_hop_share,
    "logit_attribution": _logit_attribution,
}


def _patching(run: xr.DataTree) -> dict[str, Criterion]:
    """A criterion for each derived/ group that has patched heads."""
    return {
        f"patching_{path.rpartition('/')[2]}": _patched_heads(path)
        for path in run.groups
        if path.startswith("/derived/")
        and PATCHING in group(run, path)
        and {"layer", "head"} <= set(group(run, path)[PATCHING].dims)
    }


def _patched_heads(path: str) -> Criterion:
    def recovered(run: xr.DataTree, max_bytes: int) -> xr.DataArray:
        result = group(run, path)
        values = result[PATCHING]
        pairs = [dim for dim in _PAIRS if dim in values.dims]
        values = values.mean([dim for dim in values.dims if dim not in ("layer", "head", *pairs)])
        kept = {"layer", "head", "sample_index"}
        values = values.drop_vars([name for name in values.coords if name not in kept])
        if not pairs:
            return values.transpose("layer", "head")
        values = values.rename({pairs[0]: "sample"}) if pairs[0] != "sample" else values
        if "sample_index" not in values.coords:
            values = values.assign_coords(sample_index=("sample", np.arange(values.sizes["sample"])))
        return values.transpose("layer", "sample", "head")

    return recovered
