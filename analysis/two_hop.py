"""How the last token gets at the image: directly, or through text tokens that looked at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .blocks import MAX_BYTES, sample_spans
from .text_hops import FirstHop, map_hops, stacked_hops

Floats = NDArray[np.float32]

_MEASURES: dict[str, dict[str, str]] = {
    "direct": {"units": "1", "long_name": "attention mass of the source on the target"},
    "indirect": {"units": "1", "long_name": "attention mass through text tokens on the target"},
    "ratio": {"units": "1", "long_name": "indirect / direct"},
    "share": {"units": "1", "long_name": "indirect / (direct + indirect)"},
    "correlation": {"units": "1", "long_name": "correlation of the two hops over text tokens"},
    "hub_position": {"units": "1", "long_name": "place of the hub token in its sample"},
    "hub_share": {"units": "1", "long_name": "part of the indirect mass that passes through the hub token"},
}


def two_hop(
    run: xr.DataTree,
    *,
    first_hop: FirstHop = "same",
    via: str = "text",
    source: str = "last",
    target: str = "image",
    stack: str = "text",
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Direct and indirect attention of the last token to the image, for every layer and head; lazy.

    With s the source, a_t = A[s, t] the weight of one head on a text token t before it, and m_t the mass of t
    on the image, averaged over heads:
    direct = sum over image keys i of A[s, i];  indirect = sum_t a_t m_t;  ratio = indirect / direct;
    share = indirect / (direct + indirect);  correlation = Pearson's r of a_t and m_t over t;
    hub = the t with the largest a_t m_t.
    Direct and indirect are linear in A[s], so that their means over heads are those of the mean attention.

    Parameters
    ----------
    first_hop
        ``"same"``: m_t in the layer itself, as is usual. ``"earlier"``: the mean of m_t over the lower layers
        held here, whose writing is all that the source can read in this layer.
    via, source, target
        Token selections, see `select_tokens`. Of `via`, tokens before the source count; those that may look
        at no image token add nothing, and are left out of the correlation.
    stack, layer, sample, max_bytes
        Which rows: see `attention_statistics`.

    Returns
    -------
    direct, indirect, share (layer, sample, head), float32, share of the row, 0 to 1.
    ratio (layer, sample, head), float32, from 0 upwards; inf or NaN where `direct` is 0.
    correlation (layer, sample, head), float32, -1 to 1; NaN for fewer than 3 tokens or a constant hop.
    hub_position (layer, sample, head), float32, counted from 0; NaN where `indirect` is 0.
    hub_share (layer, sample, head), float32, 0 to 1; NaN where `indirect` is 0.
    Everything but `direct` is NaN where no token of `via` may look at the image, so in the lowest layer for
    ``"earlier"``. The coordinate `sample_index` says which sample a row is.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           q lacks the source or the tokens of `via`, or a sample has several sources; see also
                        `attention_statistics`.
    SpecificationError  an unknown first hop, or a selection that does not parse.
    """
    hops, labels = stacked_hops(
        run,
        via=via,
        source=source,
        target=target,
        stack=stack,
        layer=layer,
        sample=sample,
        max_bytes=max_bytes,
    )
    spans = sample_spans(np.asarray(labels["sample_index"].values))
    measured = map_hops(_measures, hops, labels, first_hop, (len(_MEASURES),), per="sample")
    variables = {
        name: (("layer", "sample", "head"), measured[..., place], attrs)
        for place, (name, attrs) in enumerate(_MEASURES.items())
    }
    coords = {
        "layer": labels["layer"],
        "head": labels["head"],
        "sample_index": ("sample", spans.sample.astype(np.int32)),
    }
    return xr.Dataset(variables, coords, {**labels.attrs, "first_hop": first_hop})


def _measures(
    weight: Floats,
    mass: Floats,
    first: Floats,
    owner: NDArray[Any],
    position: NDArray[Any],
    is_source: NDArray[np.bool_],
    is_via: NDArray[np.bool_],
) -> Floats:
    """(layer, sample, head, measure) of one block."""
    spans = sample_spans(owner)
    result = np.empty((weight.shape[0], len(spans.sample), weight.shape[2], len(_MEASURES)), np.float32)
    for layer in range(weight.shape[0]):
        for number, rows in enumerate(map(slice, spans.start, spans.stop)):
            labels = position[rows], is_source[rows], is_via[rows]
            result[layer, number] = _measures_of_sample(
                weight[layer, rows], mass[layer, rows], first[layer, rows], *labels
            )
    return result


def _measures_of_sample(
    weight: Floats,
    mass: Floats,
    first: Floats,
    position: NDArray[Any],
    is_source: NDArray[np.bool_],
    is_via: NDArray[np.bool_],
) -> Floats:
    """(head, measure) from a_t (token, head), the masses (token, head) and m_t (token)."""
    measures = np.full((weight.shape[1], len(_MEASURES)), np.nan, np.float32)
    direct = mass[is_source][0]
    seeing = is_via & ~np.isnan(first)
    if seeing.any():
        # A source that a window keeps from the image has no direct attention, which is 0 and not unknown.
        direct = np.nan_to_num(direct)
        paths = weight[seeing] * first[seeing, None]
        indirect = paths.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, share = indirect / direct, indirect / (direct + indirect)
            hub_share = np.where(indirect > 0, paths.max(axis=0) / indirect, np.nan)
        hub = np.where(indirect > 0, position[seeing][paths.argmax(axis=0)], np.nan)
        correlation = _correlation(weight[seeing], first[seeing])
        measures[:, 1:] = np.stack([indirect, ratio, share, correlation, hub, hub_share], axis=-1)
    measures[:, 0] = direct
    return measures


def _correlation(weight: Floats, first: Floats) -> NDArray[np.float64]:
    """Pearson's r over tokens, for each head."""
    if len(first) < 3:
        return np.full(weight.shape[1], np.nan)
    left, right = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in (weight, first))
    norms = np.sqrt((left**2).sum(axis=0) * (right**2).sum())
    # Constant up to rounding is constant.
    varied = norms > 1e-12
    return np.where(varied, right @ left / np.where(varied, norms, 1), np.nan)
