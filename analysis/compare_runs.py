"""Do two runs of the same samples hold the same numbers? A certificate, site by site and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store import group, site, sites
from mechanistic.store.differences import differences
from mechanistic.store.errors import DataError, DimensionError

from .matched_answers import compare_answers
from .matched_rows import Ints, MatchedSamples, match_entries, match_rows, match_samples
from .site_difference import Difference, layer_differences
from .token_selection import token_axis

MAX_BYTES = 64 << 20


def compare_runs(
    first: xr.DataTree,
    second: xr.DataTree,
    *,
    names: Sequence[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """How far `second` is from `first`, for each site and layer that both hold; computed at once.

    Samples are matched by `sample_id` and by the tokens of their prompts, rows by sample and position, layers
    and heads by their numbers; answer tokens count as far as the answers are the same. The runs may differ in
    dtype, backend, layers and tokens. Both are read once, in blocks of `max_bytes`.

    Parameters
    ----------
    names
        Only these sites, such as ``["text/resid_post"]``; they must be in both runs.

    Returns
    -------
    max_difference (site, layer), float64, units of the site: the largest |a - b|. Values that are equal,
        infinities and NaN among them, differ by 0. NaN here and below: not in both runs.
    relative_difference (site, layer), float64: max_difference / the largest |a| of the layer.
    relative_rms (site, layer), float64: root of sum (a - b)^2 / sum a^2.
    cosine, cosine_min (site, layer), float64: mean and least over tokens, all heads and features of a token
        together; NaN for attention patterns.
    worst_sample, worst_token (site, layer), str; worst_position (site, layer), int64: where
        max_difference is.
    n_token (site), int64: rows compared in each layer.
    top_option_agrees (sample), int8: whether the same option has the largest logit; -1: a run has none.
    option_logit_difference (sample), float64, logits: the largest difference; NaN where one run has none.
    prediction_agrees (sample), bool: whether the generated answers are the same text.
    top_option_agreement, prediction_agreement (), float64, shares.
    n_sample, n_excluded (), int64: samples compared; samples that failed in a run.

    Raises
    ------
    DataError         a sample is in one run only, or has another prompt there, by name; no site is in both;
                      one run holds NaN or infinity where the other has a number, by site, layer and sample.
    MissingSiteError  a site of `names` that a run does not have.
    DimensionError    a site has another width in the other run.
    """
    matched = match_samples(first, second)
    parts = [
        part
        for name in _shared(first, second, names)
        for part in _site(first, second, name, matched, max_bytes)
    ]
    if not parts:
        raise DataError(
            "no rows of any site are in both runs.",
            "Capture one of the same layers, tokens and heads in both.",
        )
    result = xr.concat(parts, "site", join="outer", fill_value=_FILL)
    result = result.merge(compare_answers(first, second, matched), combine_attrs="drop")
    result["n_excluded"] = xr.DataArray(np.int64(matched.excluded), attrs={"units": "sample"})
    attrs = [{str(key): value for key, value in run.attrs.items()} for run in (first, second)]
    result.attrs = {
        "first": _about(attrs[0]),
        "second": _about(attrs[1]),
        "differing": differences(attrs[0], attrs[1]),
        "only_first": sorted(set(sites(first)) - set(sites(second))),
        "only_second": sorted(set(sites(second)) - set(sites(first))),
    }
    return result


_FILL: dict[Any, Any] = {"worst_sample": "", "worst_token": "", "worst_position": -1}


def _about(attrs: dict[str, Any]) -> dict[str, Any]:
    model = attrs.get("model", {})
    kept = ("name", "revision", "dtype", "backend", "attention", "weights_sha256")
    return {"run_id": attrs.get("run_id")} | {key: model[key] for key in kept if key in model}


def _shared(first: xr.DataTree, second: xr.DataTree, names: Sequence[str] | None) -> list[str]:
    if names is not None:
        wanted = [name.replace(".", "/") for name in names]
        for run in (first, second):
            for name in wanted:
                site(run, name)
        return wanted
    held = sorted(set(sites(first)) & set(sites(second)))
    if not held:
        own = [", ".join(sites(run)) or "none" for run in (first, second)]
        raise DataError(
            f"no site is in both runs: the first has {own[0]}, the second {own[1]}.",
            "Capture both with the same --sites.",
        )
    return [name for name in held if not name.endswith("/pattern_rows")]


def _site(
    first: xr.DataTree, second: xr.DataTree, name: str, matched: MatchedSamples, max_bytes: int
) -> Iterator[xr.Dataset]:
    """The comparison of each floating array of a site: one, but for attention statistics."""
    pattern = name.endswith("/pattern")
    datasets = [site(run, name) for run in (first, second)]
    labels = [
        site(run, f"{name}_rows") if pattern else own
        for run, own in zip((first, second), datasets, strict=True)
    ]
    rows = matched.numbers
    if "sample_index" in labels[0].variables:
        rows = match_rows(labels[0], labels[1], name.split("/")[0], matched)
    numbers = [np.asarray(dataset["layer"].values).tolist() for dataset in datasets]
    layers = [number for number in numbers[0] if number in numbers[1]]
    if not len(rows[0]) or not layers:
        return
    places = [(numbers[0].index(number), numbers[1].index(number)) for number in layers]
    for key in _numeric(*datasets):
        arrays = _same_shape(datasets[0][key], datasets[1][key], name)
        batches = [(rows, np.arange(len(rows[0])))]
        found = [Difference() for _ in layers]
        for chosen, owner in match_entries(labels[0], labels[1], rows) if pattern else batches:
            parts = layer_differences(arrays[0].data, arrays[1].data, chosen, places, max_bytes)
            found = [a.joined(b.of(owner)) for a, b in zip(found, parts, strict=True)]
        label = name if name.split("/")[1] == key else f"{name}/{key}"
        table = _table(found, label, layers, _Rows(first, labels[0], rows[0]))
        table["n_token"] = ("site", [np.int64(len(rows[0]))])
        yield table.drop_vars(["cosine", "cosine_min"]) if pattern else table


def _numeric(first: xr.Dataset, second: xr.Dataset) -> list[str]:
    held = [str(name) for name, v in first.data_vars.items() if v.dtype.kind == "f" and "layer" in v.dims]
    return [name for name in held if name in second.data_vars]


def _same_shape(first: xr.DataArray, second: xr.DataArray, name: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Both arrays, of the heads that both have."""
    for dim in first.dims[2:]:
        if dim in first.coords and dim in second.coords:
            held = [array[dim].values.tolist() for array in (first, second)]
            both = [number for number in held[0] if number in held[1]]
            if held != [both, both]:
                first = first.isel({dim: [held[0].index(number) for number in both]})
                second = second.isel({dim: [held[1].index(number) for number in both]})
    if first.dims != second.dims or first.shape[2:] != second.shape[2:] or 0 in first.shape[2:]:
        raise DimensionError(
            f"{name} is {dict(first.sizes)} in the first run and {dict(second.sizes)} in the second.",
            "Compare runs of models of the same shape.",
        )
    return first, second


@dataclass(frozen=True)
class _Rows:
    """The compared rows of a site in the first run: `numbers` on its own axis."""

    run: xr.DataTree
    labels: xr.Dataset
    numbers: Ints

    def places(self, rows: Sequence[int]) -> list[tuple[str, int, str]]:
        """Sample, position and text of compared rows."""
        labels, chosen = self.labels, self.numbers[np.asarray(rows)]
        if "sample_index" not in labels.variables:
            labels = group(self.run, "tokens/text")
            last = np.flatnonzero(labels["is_last_prompt"].values)
            chosen = last[np.searchsorted(labels["sample_index"].values[last], chosen)]
        kept = ("sample_index", "position", "token_text", "patch_row", "patch_col")
        here = labels.isel({token_axis(labels): chosen})
        columns = {name: here[name].values.tolist() for name in kept if name in here.variables}
        ids = group(self.run, "samples")["sample_id"].isel(sample=columns["sample_index"]).values
        texts = columns.get("token_text", [""] * len(chosen))
        cells = zip(columns["patch_row"], columns["patch_col"], strict=True)
        words = [
            f"{text} ({cell[0]}, {cell[1]})".strip() if min(cell) >= 0 else str(text)
            for text, cell in zip(texts, cells, strict=True)
        ]
        return list(zip(map(str, ids), columns["position"], words, strict=True))


def _table(found: Sequence[Difference], name: str, layers: list[int], rows: _Rows) -> xr.Dataset:
    for layer, part in zip(layers, found, strict=True):
        if part.unmatched >= 0:
            ((sample, position, _),) = rows.places([part.unmatched])
            raise DataError(
                f"{name} of layer {layer} has NaN or infinity in one run only: sample {sample!r}, "
                f"position {position}.",
                "Capture that sample again; half precision overflows at 65504.",
            )
    worst = rows.places([part.worst for part in found])
    with np.errstate(invalid="ignore", divide="ignore"):
        largest, scale, square, energy, cosine = (
            np.array([getattr(part, key) for part in found])
            for key in ("largest", "scale", "square", "energy", "cosine")
        )
        columns: dict[str, Any] = {
            "max_difference": largest,
            "relative_difference": np.where(largest > 0, largest / scale, 0.0),
            "relative_rms": np.where(square > 0, np.sqrt(square / energy), 0.0),
            "cosine": cosine / np.array([part.rows for part in found]),
            "cosine_min": np.array([part.least for part in found]),
            "worst_sample": np.array([place[0] for place in worst], object),
            "worst_position": np.array([place[1] for place in worst], np.int64),
            "worst_token": np.array([place[2] for place in worst], object),
        }
    variables = {
        key: (("site", "layer"), values[None], _ATTRS.get(key, {})) for key, values in columns.items()
    }
    return xr.Dataset(variables, {"site": [name], "layer": np.array(layers, np.int32)})


_ATTRS = {
    "max_difference": {"long_name": "largest |a - b|", "units": "as the site"},
    "relative_difference": {"long_name": "largest |a - b| / largest |a|", "units": "1"},
    "relative_rms": {"long_name": "root of sum (a - b)^2 / sum a^2", "units": "1"},
    "cosine": {"long_name": "mean cosine of a and b over tokens", "units": "1"},
    "cosine_min": {"long_name": "least cosine of a and b of a token", "units": "1"},
}
