"""Which words carry the way from the last token over text tokens to the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .blocks import MAX_BYTES, sample_spans
from .text_hops import FirstHop, map_hops, stacked_hops

Floats = NDArray[np.float32]


def hub_tokens(
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
    """Which words carry the indirect path: the part of `indirect` that passes through each; lazy.

    The texts of the tokens are read at once, the numbers only when computed. Options: see `two_hop`.

    Returns
    -------
    hub_share (layer, head, word), float32, 0 to 1.
        a_t m_t / indirect, summed over the tokens with this text and averaged over the samples that have one;
        NaN where all of these have no indirect attention.
    n_sample (word), int64: samples that have such a token.

    Raises
    ------
    as `two_hop`.
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
    is_via = np.asarray(labels["is_via"].values)
    texts = np.array([str(text) for text in labels["token_text"].values], object)
    words, code = np.unique(texts[is_via], return_inverse=True)
    word_of_row = np.full(len(texts), -1)
    word_of_row[is_via] = code
    pairs = np.unique(np.stack([np.asarray(labels["sample_index"].values)[is_via], code]), axis=1)
    kernel = partial(_word_sums, words=len(words))
    sums = map_hops(kernel, hops, labels, first_hop, (len(words), 2), word_of_row, per="block").sum(axis=1)
    mean = sums[..., 0] / da.where(sums[..., 1] > 0, sums[..., 1], np.nan)
    attrs = {"units": "1", "long_name": "part of the indirect mass through this word"}
    variables = {
        "hub_share": (("layer", "head", "word"), mean.astype(np.float32), attrs),
        "n_sample": ("word", np.bincount(pairs[1]).astype(np.int64), {"units": "sample"}),
    }
    coords = {"layer": labels["layer"], "head": labels["head"], "word": words}
    return xr.Dataset(variables, coords, {**labels.attrs, "first_hop": first_hop})


def _word_sums(
    weight: Floats,
    mass: Floats,
    first: Floats,
    owner: NDArray[Any],
    position: NDArray[Any],
    is_source: NDArray[np.bool_],
    is_via: NDArray[np.bool_],
    word: NDArray[np.int64],
    *,
    words: int,
) -> NDArray[np.float64]:
    """(layer, 1, head, word, 2): each word's shares summed over the samples of a block, and their number."""
    spans = sample_spans(owner)
    sums = np.zeros((weight.shape[0], 1, weight.shape[2], words, 2))
    paths = np.where(is_via[:, None], np.nan_to_num(weight * first[..., None]), 0)
    total = np.add.reduceat(paths, spans.start, axis=1) if len(owner) else paths
    for number, rows in enumerate(map(slice, spans.start, spans.stop)):
        codes, place = np.unique(word[rows][is_via[rows]], return_inverse=True)
        own = np.zeros((*total[:, number].shape, len(codes)))
        np.add.at(np.moveaxis(own, -1, 0), place, np.moveaxis(paths[:, rows][:, is_via[rows]], 1, 0))
        whole = total[:, number, :, None]
        sums[:, 0, :, codes, 0] += np.moveaxis(own / np.where(whole > 0, whole, np.inf), -1, 0)
        sums[:, 0, :, codes, 1] += np.moveaxis(np.broadcast_to(whole > 0, own.shape), -1, 0)
    return sums
