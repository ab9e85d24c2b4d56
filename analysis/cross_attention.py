"""Where in the image each word looks: cross-attention, or the text-to-image block of self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import sites
from mechanistic.store.errors import DataError, SpecificationError
from mechanistic.store.schema import KIND

from .attention_pattern import attention_pattern
from .attention_weights import PATTERN
from .question_words import question_words

Join = Literal["mean", "sum", "max"]

_JOINS = ("mean", "sum", "max")


def cross_attention(
    run: xr.DataTree,
    *,
    sample: int,
    words: Mapping[str, Sequence[int]] | None = None,
    join: Join = "mean",
    layer: int | Sequence[int] | None = None,
    head: int | Sequence[int] | None = None,
    stack: str = "text",
) -> xr.Dataset:
    """Attention of each word of one question to each patch of its images; lazy.

    Cross-attention where the run holds it (xq and xk); in other models text attends to image tokens within
    self-attention, and this is that block of q and k. The attribute `computed_from` says which it was.

    Parameters
    ----------
    sample
        A row of samples/.
    words
        {word: positions of its tokens}; None means the words of the question (`question_words`).
    join
        How the rows of a word's tokens become one: ``"mean"`` keeps it a share of a row.
    layer, head
        True numbers. One number drops the dimension, a list keeps it, None means all that are captured.

    Returns
    -------
    cross_attention (layer, head, word, key), float32, share of the word's attention row; NaN where it may
        look at no key. Self-attention goes to text as well, so that it sums to less than 1 over patches.
        The keys have kind, image_index, tile, patch_row, patch_col and box_x0 to box_y1, which
        `plot_cross_attention_attribution` reads; the words have n_token.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           the sample has no image tokens, q lacks tokens of a word, or the tokens do not spell
                        the question; see also `attention_pattern`.
    SpecificationError  a layer, head or way to join that does not exist.
    """
    if join not in _JOINS:
        raise SpecificationError(f"Tokens cannot be joined by {join!r}.", f"Use {', '.join(_JOINS)}.")
    true = f"{stack}/xq" in sites(run)
    pattern = attention_pattern(
        run, sample=sample, layer=layer, head=head, query="text", stack=stack, cross=true
    )
    wanted = question_words(run, sample, stack=stack) if words is None else words
    rows = _rows_of_words(pattern, wanted, sample, stack)
    patches = np.flatnonzero(np.asarray(pattern["key_kind"].values) == KIND["image"])
    if not patches.size:
        raise DataError(
            f"none of the keys of sample {sample} is an image token.", "Choose a sample that has an image."
        )
    weights = pattern[PATTERN].isel(key=patches)
    joined: xr.DataArray = xr.apply_ufunc(
        partial(_join_rows, rows=rows, join=join),
        weights.drop_vars([name for name in weights.coords if str(name).startswith("query_")]),
        input_core_dims=[["query", "key"]],
        output_core_dims=[["word", "key"]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": {"word": len(rows)}},
    )
    renamed = {
        str(name): str(name).removeprefix("key_") for name in joined.coords if str(name).startswith("key_")
    }
    result = joined.rename(renamed).assign_attrs(units="1", long_name="attention of the word to the patch")
    labels = {
        "word": np.array(list(wanted), object),
        "n_token": ("word", np.array([len(places) for places in rows])),
    }
    attrs = {"sample": int(sample), "stack": stack, "join": join}
    attrs["computed_from"] = "xq and xk" if true else "q and k"
    return result.assign_coords(labels).to_dataset(name="cross_attention").assign_attrs(attrs)


def _rows_of_words(
    pattern: xr.Dataset, words: Mapping[str, Sequence[int]], sample: int, stack: str
) -> list[NDArray[np.int64]]:
    """For each word, the rows of its tokens on the query axis."""
    position = np.asarray(pattern["query_position"].values)
    rows = []
    for word, places in words.items():
        missing = np.setdiff1d(places, position)
        if missing.size or not len(places):
            raise DataError(
                f"{word!r} has the positions {list(map(int, places))}; q of sample {sample} lacks "
                f"{', '.join(map(str, missing)) or 'nothing, but a word needs one'}.",
                f"Capture all text queries, --sites '{stack}.*.q[text]', and count positions from 0.",
            )
        rows.append(np.flatnonzero(np.isin(position, places)))
    return rows


def _join_rows(weights: NDArray[Any], rows: list[NDArray[np.int64]], join: Join) -> NDArray[np.float32]:
    """Weights (..., query, key) as (..., word, key)."""
    reduce = np.maximum if join == "max" else np.add
    parts = [
        reduce.reduce(weights[..., places, :], axis=-2) / (len(places) if join == "mean" else 1)
        for places in rows
    ]
    return np.stack(parts, axis=-2).astype(np.float32)
