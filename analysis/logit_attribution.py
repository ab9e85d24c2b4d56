"""What each head, or each sublayer, writes directly into the logit of the right answer at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group, site, sites
from mechanistic.store.errors import DataError, MissingSiteError, SpecificationError

from .map_rows import finite_values
from .splits import captured_samples
from .token_selection import select_layers, select_tokens, token_axis

Floats = NDArray[np.float32]

_SITES = ("z", "attn_out", "mlp_out")
# Relative: bfloat16 logits are off by a few hundredths, those read from another layer by whole units.
_LOGIT_TOLERANCE = 0.25


def logit_attribution(
    run: xr.DataTree,
    *,
    of: Literal["z", "attn_out", "mlp_out"] = "z",
    layer: int | Sequence[int] | None = None,
) -> xr.Dataset:
    """Direct logit attribution at the last prompt token, right answer against the mean of the other options.

    A part p of the final residual x = sum of p is worth u . N(p), where N is the final norm with its scale
    frozen at that of x, and u = unembed[answer] - mean of unembed[other options]. Parts are head outputs
    z W_O (``"z"``), or the sublayers' outputs. Over every part, embeddings included, worths sum to the logit
    difference, but for biases; over heads, to attn_out's, but for the output projection's bias. Lazy.

    Parameters
    ----------
    of
        ``"z"`` needs z, and head_readout in readout/; ``"attn_out"`` and ``"mlp_out"`` that site.
    layer
        True layer numbers; None means all that are captured.

    Returns
    -------
    logit_attribution (layer, sample, head) of z, (layer, sample) otherwise, float32, logits before softcap.
        Above 0 speaks for the right answer. NaN for a sample without a known answer, or where an option is
        not in the readout. The coordinate `sample_index` says which sample a row is.

    Raises
    ------
    MissingSiteError    the run lacks the site, resid_post at the last token, or what readout/ must hold.
    SpecificationError  `of` is none of these, or a layer is not held.
    DataError           the highest resid_post is not what the readout reads, no sample has an answer in the
                        readout, or no row of the site is the last prompt token; when computed, a value
                        that is not finite (by sample and layer).

    References
    ----------
    Elhage et al. (2021), A Mathematical Framework for Transformer Circuits; Wang et al. (2023),
    Interpretability in the Wild, section 3.1.
    """
    if of not in _SITES:
        raise SpecificationError(f"Nothing is attributed to {of!r}.", f"Choose one of {', '.join(_SITES)}.")
    readout = _readout(run)
    parts = select_layers(_last_rows(run, f"text/{of}"), layer)
    part = parts[of if of in parts else f"{of}_last"]
    part = finite_values(part).astype(np.float32)
    part = part.drop_vars(list(part.coords))
    samples = np.asarray(parts["sample_index"].values)
    final, contrast = _final_rows(run, samples), _contrasts(run, readout, samples)
    _require_final(run, readout, final, samples)
    kind = str(readout.attrs["norm_kind"])
    inner, rows = "d_model", _word_rows(readout, kind)
    if of == "z":
        inner, rows = "d_head", _head_rows(readout, parts)
    worth = xr.dot(part, rows, dim=inner)
    difference = xr.dot(worth, contrast, dim="word") / _scale(final, kind, float(readout.attrs["eps"]))
    dims = ("layer", "sample", "head") if of == "z" else ("layer", "sample")
    attrs = {"units": "logit", "long_name": "direct logit attribution, answer against other options"}
    variable = difference.transpose(*dims).astype(np.float32).assign_attrs(attrs)
    kept = {name: parts[name] for name in ("layer", "sample_index", "head") if name in parts.variables}
    return xr.Dataset({"logit_attribution": variable}, kept, {"of": of})


def _readout(run: xr.DataTree) -> xr.Dataset:
    if "/readout" not in run.groups:
        raise MissingSiteError(
            "this run has no readout/: the final norm and the unembedding rows of the answer words.",
            "Capture it again; models without an unembedding of their own have none.",
        )
    return group(run, "readout").compute()


def _last_rows(run: xr.DataTree, name: str) -> xr.Dataset:
    """The rows of a site at the last prompt token, on the dimension `sample` with `sample_index`.

    Failed samples, which have a row where the site has one for each sample, are left out.
    """
    if f"{name}_last" in sites(run):
        captured = captured_samples(run)
        rows = site(run, f"{name}_last").isel(sample=captured)
        return rows.assign_coords(sample_index=("sample", captured.astype(np.int32)))
    rows = select_tokens(site(run, name), "last")
    axis = token_axis(rows)
    owner = rows["sample_index"].values
    rows = rows.drop_vars([label for label, coord in rows.coords.items() if axis in coord.dims])
    return rows.rename({axis: "sample"}).assign_coords(sample_index=("sample", owner))


def _final_rows(run: xr.DataTree, samples: NDArray[Any]) -> xr.DataArray:
    """The residual (sample, d_model) that the final norm reads, of these samples."""
    rows = _last_rows(run, "text/resid_post")
    owner = np.asarray(rows["sample_index"].values)
    place = np.searchsorted(owner, samples)
    if (place >= len(owner)).any() or (owner[place] != samples).any():
        raise DataError(
            "resid_post lacks the last token of samples that this site has.",
            "Capture both of the same samples: --sites 'text.*.resid_post[last]'.",
        )
    name = "resid_post_last" if "resid_post_last" in rows else "resid_post"
    last = rows[name].isel(layer=[int(np.argmax(rows["layer"].values))], sample=place)
    return finite_values(last).isel(layer=0, drop=True)


def _contrasts(run: xr.DataTree, readout: xr.Dataset, samples: NDArray[Any]) -> xr.DataArray:
    """(sample, word): 1 at the right answer, -1 over their number at the other options; NaN where unknown."""
    table = group(run, "samples")[["options", "answer_index"]].isel(sample=samples).compute()
    words = {str(word): place for place, word in enumerate(readout["word"].values)}
    contrast = np.full((len(samples), len(words)), np.nan, np.float32)
    for row, (options, answer) in enumerate(
        zip(table["options"].values, table["answer_index"].values, strict=True)
    ):
        shown = [str(option) for option in options if str(option)]
        if answer < 0 or len(shown) < 2 or any(option not in words for option in shown):
            continue
        contrast[row] = 0
        for place, option in enumerate(shown):
            contrast[row, words[option]] += 1 if place == answer else -1 / (len(shown) - 1)
    if np.isnan(contrast).all():
        raise DataError(
            f"no sample has an answer and all of its options among the readout's words: {', '.join(words)}.",
            "Capture with a dataset whose samples have options and an answer.",
        )
    return xr.DataArray(contrast, dims=("sample", "word"))


def _require_final(run: xr.DataTree, readout: xr.Dataset, final: xr.DataArray, samples: NDArray[Any]) -> None:
    """Through the readout, the residual of one sample must give the logits that the model gave."""
    table = group(run, "samples")[["options", "option_logits"]].isel(sample=samples).compute()
    words = [str(word) for word in readout["word"].values]
    given = table["option_logits"].values
    for row in np.flatnonzero(np.isfinite(given).any(axis=1))[:1]:
        options = [str(option) for option in table["options"].values[row]]
        logits = _logits(final.isel(sample=row).values.astype(np.float32), readout)
        off = [
            abs(float(given[row, place]) - float(logits[words.index(option)])) / (1 + abs(given[row, place]))
            for place, option in enumerate(options)
            if option in words and np.isfinite(given[row, place])
        ]
        if max(off, default=0) > _LOGIT_TOLERANCE:
            raise DataError(
                "the highest resid_post held here does not give the model's logits: not the last layer's.",
                "Capture the last layer too: --sites 'text.*.resid_post[last]'.",
            )


def _logits(row: Floats, readout: xr.Dataset) -> Floats:
    kind = str(readout.attrs["norm_kind"])
    final = xr.DataArray(row[None], dims=("sample", "d_model"))
    scale = float(_scale(final, kind, float(readout.attrs["eps"]))[0])
    logits = _word_rows(readout, kind).values @ row / scale
    if "final_norm_bias" in readout:
        logits = logits + readout["unembed"].values @ readout["final_norm_bias"].values
    if "unembed_bias" in readout:
        logits = logits + readout["unembed_bias"].values
    cap = readout.attrs.get("softcap")
    return np.asarray(logits if cap is None else cap * np.tanh(logits / cap), np.float32)


def _word_rows(readout: xr.Dataset, kind: str) -> xr.DataArray:
    """(word, d_model): what a residual is multiplied with, the norm's weight and its centring included."""
    weight = readout["final_norm_weight"] + float(readout.attrs["weight_offset"])
    rows = (readout["unembed"] * weight).astype(np.float32)
    rows = rows - rows.mean("d_model") if kind == "layer" else rows
    return rows.transpose("word", "d_model").drop_vars(list(rows.coords))


def _scale(final: xr.DataArray, kind: str, eps: float) -> xr.DataArray:
    """(sample): what the final norm divides by."""
    values = final.astype(np.float32)
    centred = values - values.mean("d_model") if kind == "layer" else values
    return xr.DataArray(np.sqrt((centred**2).mean("d_model") + np.float32(eps)))


def _head_rows(readout: xr.Dataset, parts: xr.Dataset) -> xr.DataArray:
    """(layer, head, d_head, word) for the layers and heads of `parts`."""
    if "head_readout" not in readout:
        why = readout.attrs.get("no_head_readout")
        raise MissingSiteError(
            "readout/ has no head_readout, each head's output projection onto the answer words"
            + (f": {why}." if why else "."),
            "Attribute layers instead (of='attn_out'), or capture again with z among the sites.",
        )
    rows = readout["head_readout"]
    chosen = {}
    for dim in ("layer", "head"):
        held = np.asarray(rows[dim].values).tolist()
        wanted = np.asarray(parts[dim].values).tolist()
        if missing := [number for number in wanted if number not in held]:
            raise MissingSiteError(
                f"head_readout lacks {dim} {', '.join(map(str, missing))}, which z has.",
                "Both are written together: capture the run again.",
            )
        chosen[dim] = [held.index(number) for number in wanted]
    rows = rows.isel(chosen)
    return rows.drop_vars(list(rows.coords))
