"""The logit lens: what the model would answer if it stopped after each layer, from the store alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError

from .finite import require_finite
from .map_rows import map_rows
from .readout import Readout
from .representation_rows import layer_numbers, representation_rows, sample_numbers
from .single_precision import to_single
from .splits import row_labels

Floats = NDArray[np.float32]


def logit_lens(
    run: xr.DataTree,
    *,
    site: str = "text/resid_post",
    tokens: str | None = "last",
    layer: int | Sequence[int] | None = None,
) -> xr.Dataset:
    """Logits and probabilities of each sample's options after every layer: unembed . norm(residual); lazy.

    The final norm and the unembedding rows of the answer words come from the run's readout, so no model is
    needed. An option counts by its first token, and probabilities are over the sample's options, or, where no
    sample has any (open questions), over all answers that occur in the run.

    Parameters
    ----------
    site, tokens, layer
        Residuals to read, see `select_tokens`; ``"last"`` is where the model answers.

    Returns
    -------
    option_logit (layer, row, option), float32: NaN where the sample has no such option, or where its first
        token is another option's too.
    option_probability (layer, row, option), float32: softmax over the sample's options; NaN as above.
    answer_probability (layer, row), float32: the right option's; NaN where that is not known or has no logit.
    logit_gap (layer, row), float32: the right option's logit less that of the best other one; above 0 where
        the lens is right. NaN as above.
    lens_correct (layer, row), float32: 1, 0, or NaN as above.
    first_correct_layer (row), float32: number of the first layer that is right; settled_layer (row), float32:
        of the first from which on all later ones are. Both among the layers read; NaN if there is none.
    options (row, option), str, coordinate; rows keep their labels.

    Raises
    ------
    MissingSiteError    the run has no readout, or lacks the site.
    SpecificationError  no such layer or token selection.
    FormatError         the readout describes a norm that is not known.
    DataError           no option of any sample is a word of the readout, or, when computed, a residual is not
                        finite (by sample and layer).

    References
    ----------
    nostalgebraist (2020), interpreting GPT: the logit lens.
    """
    readout = Readout.of(run)
    rows = representation_rows(run, site=site, tokens=tokens, layer=layer)
    axis = str(rows.dims[1])
    options, answer, place = _options(run, readout, sample_numbers(rows))
    numbers = np.asarray(layer_numbers(rows))
    result = _lens(rows, place, answer, readout)
    result = result.merge(_first_layers(result["lens_correct"], numbers))
    coords = {name: coord for name, coord in rows.coords.items() if name != "layer"}
    result = result.assign_coords({**coords, "layer": numbers, "options": ((axis, "option"), options)})
    result.attrs = {"site": site, "tokens": tokens or "all", "words": ", ".join(readout.words)}
    return result


def _options(
    run: xr.DataTree, readout: Readout, owner: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Options (row, option), the right one (row), the word of each (row, option); -1 where there is none."""
    samples = group(run, "samples")
    answers = row_labels(samples["answer"])
    known = row_labels(samples["options"]) if "options" in samples else np.empty((len(answers), 0), str)
    if not (known != "").any():
        unique = np.unique(answers[answers != ""])
        known = np.broadcast_to(unique, (len(answers), len(unique)))
    number = {word: place for place, word in enumerate(readout.words)}
    place = np.array([[number.get(option, -1) for option in row] for row in known.tolist()], np.int64)
    place = place.reshape(known.shape)
    if "option_logits" in samples and samples["option_logits"].shape == known.shape:
        stored = samples["option_logits"].values
        # Where the model's own logits were stored, an option without one shares its first token with another.
        place[~np.isfinite(stored) & np.isfinite(stored).any(axis=1, keepdims=True)] = -1
    if (place < 0).all():
        raise DataError(
            f"no option of these samples is a word of the readout, which holds {', '.join(readout.words)}.",
            "The options' first tokens are shared or unknown to the tokenizer; see samples/option_note.",
        )
    hits = (known == answers[:, None]) & (answers[:, None] != "")
    answer = np.where(hits.any(axis=1), hits.argmax(axis=1), -1)
    return known[owner], answer[owner], place[owner]


def _lens(
    rows: xr.DataArray, place: NDArray[np.int64], answer: NDArray[np.int64], readout: Readout
) -> xr.Dataset:
    axis, options = str(rows.dims[1]), place.shape[1]
    packed = map_rows(
        partial(_lens_kernel, readout=readout),
        rows,
        xr.DataArray(place, dims=(axis, "option")),
        xr.DataArray(answer, dims=axis),
        into="packed",
        size=2 * options + 3,
    ).reset_coords(drop=True)
    logit = {"long_name": "logit lens", "units": "logit"}
    share = {"units": "1"}
    parts = {
        "option_logit": (slice(options), logit),
        "option_probability": (slice(options, -3), {**share, "long_name": "probability among the options"}),
        "answer_probability": (-3, {**share, "long_name": "probability of the right answer"}),
        "logit_gap": (-2, {"units": "logit", "long_name": "right answer less best wrong one"}),
        "lens_correct": (-1, {**share, "long_name": "right answer has the largest logit"}),
    }
    variables = {}
    for name, (where, attrs) in parts.items():
        part = packed.isel(packed=where)
        part = part.rename(packed="option") if "packed" in part.dims else part
        variables[name] = part.assign_attrs(attrs)
    return xr.Dataset(variables)


def _lens_kernel(
    residual: NDArray[Any],
    layer: NDArray[np.int64],
    sample: NDArray[np.int64],
    place: NDArray[np.int64],
    answer: NDArray[np.int64],
    readout: Readout,
) -> Floats:
    """(layer, row, 2 options + 3): logits, probabilities, right probability, gap, correct."""
    residual = to_single(residual)
    with np.errstate(invalid="ignore", over="ignore"):
        words = readout.logits(residual)
    # NaN and infinity are NaN in the logits of every word.
    require_finite(residual, sample, layer[:, None], sums=words.sum(axis=-1))
    # Words and options come first: numpy reduces a short last axis row by row.
    words = np.ascontiguousarray(np.moveaxis(words, -1, 0))
    place = np.broadcast_to(place.T[:, None], (place.shape[1], *words.shape[1:]))
    answer = np.broadcast_to(answer, words.shape[1:])
    logits = np.take_along_axis(words, np.maximum(place, 0), axis=0)
    held = place >= 0
    masked = np.where(held, logits, -np.inf)
    weights = np.exp(masked - masked.max(axis=0, initial=-1e30))
    with np.errstate(invalid="ignore"):
        probability = weights / weights.sum(axis=0)
    right = np.maximum(answer, 0)[None]
    scored = (answer >= 0) & np.take_along_axis(held, right, axis=0)[0] & (held.sum(axis=0) > 1)
    np.put_along_axis(masked, right, -np.inf, axis=0)
    with np.errstate(invalid="ignore"):
        gap = np.take_along_axis(logits, right, axis=0)[0] - masked.max(axis=0)
    chosen = np.take_along_axis(probability, right, axis=0)[0]
    parts = [*np.where(held, logits, np.nan), *np.where(held, probability, np.nan)]
    parts += [np.where(scored, single, np.nan) for single in (chosen, gap, gap > 0)]
    return np.moveaxis(np.stack(parts, dtype=np.float32, casting="same_kind"), 0, -1)


def _first_layers(correct: xr.DataArray, numbers: NDArray[np.int64]) -> xr.Dataset:
    whole = correct.chunk({"layer": -1}) if correct.chunks is not None else correct
    variables = {}
    for name, kernel in (("first_correct_layer", _first_correct), ("settled_layer", _settled)):
        variables[name] = xr.apply_ufunc(
            kernel,
            whole,
            kwargs={"numbers": numbers},
            input_core_dims=[["layer"]],
            dask="parallelized",
            output_dtypes=[np.float32],
        ).assign_attrs(units="layer")
    return xr.Dataset(variables)


def _first_correct(correct: Floats, numbers: NDArray[np.int64]) -> Floats:
    """Of (row, layer); layers may be in any order."""
    order = np.argsort(numbers)
    right = correct[..., order] == 1
    return np.where(right.any(axis=-1), numbers[order][right.argmax(axis=-1)], np.nan).astype(np.float32)


def _settled(correct: Floats, numbers: NDArray[np.int64]) -> Floats:
    order = np.argsort(numbers)
    from_last = np.flip(correct[..., order] == 1, axis=-1)
    right = np.flip(np.logical_and.accumulate(from_last, axis=-1), axis=-1)
    return np.where(right.any(axis=-1), numbers[order][right.argmax(axis=-1)], np.nan).astype(np.float32)
