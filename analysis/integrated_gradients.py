"""Integrated gradients: how much of an answer each pixel, image token or word accounts for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .attribution_table import SampleAttribution, attribute_each, attribution_table, model_attributes
from .sweep import named_sweep

_LOGIT = {"units": "logit"}
_ATTRS = {
    "integrated_gradients": {**_LOGIT, "long_name": "integrated gradients"},
    "pixel_attribution": {**_LOGIT, "long_name": "integrated gradients of the pixel"},
    "score": {**_LOGIT, "long_name": "target of the sample as it is"},
    "baseline_score": {**_LOGIT, "long_name": "target of the baseline"},
    "completeness_gap": {**_LOGIT, "long_name": "sum of the attribution less score - baseline_score"},
    "completeness_gap_relative": {
        "units": "1",
        "long_name": "size of the gap as a share of |score - baseline_score|",
    },
}


def integrated_gradients(
    model: Any,
    samples: Any,
    *,
    to: Literal["pixels", "image_embeddings", "token_embeddings"] = "image_embeddings",
    baseline: Literal["zero", "mean", "blurred"] = "mean",
    target: str | int | tuple[str | int, str | int] | None = None,
    steps: int = 50,
    internal_batch_size: int = 8,
    method: str = "gausslegendre",
    blur: float = 0.125,
    processor: Any = None,
    name: str | Path | None = None,
    quiet: bool = False,
) -> xr.Dataset:
    """Integrated gradients, IG_i = (x_i - b_i) * integral over a in [0, 1] of dF(b + a (x - b)) / dx_i.

    F is a logit at the last prompt token, or the difference of two; x what the model is given, b a baseline.
    Sums over the channels of a patch, or the width of an embedding. Computed by captum.

    Parameters
    ----------
    model
        What `load_model` returns, a name for it, or a transformers model (with `processor`).
    samples
        A pair (image, text), a Sample, a list of them, or a dataset such as ``Shapes(8)``.
    to
        ``"pixels"`` of the processed image; ``"image_embeddings"``, what the decoder is given of the image
        (the projector's output; in Qwen3-VL also what higher layers get; in Mllama and BLIP what it reads by
        cross-attention); ``"token_embeddings"`` of the question's words, with the template around them and
        the image left as they are.
    baseline
        ``"mean"``: the mean colour of the image, the mean of its tokens, the mean of the vocabulary;
        ``"blurred"``: a Gaussian over the image or its grid of tokens; ``"zero"``: zeros, which for pixels
        are the processor's mean colour. Next to zero embeddings the answer of a model with RMSNorm jumps,
        which no number of steps resolves; the gap says by how much.
    target
        A word (its first token after the prompt) or a token id; two of them: the first less the second. None:
        the option with the highest logit less the next, without options the highest logit. A model that
        compares text and image: their similarity.
    steps, method, internal_batch_size
        Points on the path, captum's rule for them, and how many of them run in one batch.
    blur
        Standard deviation of the Gaussian as a share of the image's shorter side.
    name
        Keep the result in the folder of this path. A call that was killed goes on where it was, and one that
        is finished is returned as it is.

    Returns
    -------
    integrated_gradients (patch or token), float32, logit. Patches of the encoder for pixels, tokens else,
        of all samples end to end, labelled as in a run: sample_index, image_index, tile, patch_row,
        patch_col, box_x0 to box_y1; tokens also with token_text and in_word.
    pixel_attribution (canvas, y, x), float32, logit; to pixels only: sums over channels; a canvas is an image
        as it was processed, or a tile of it; NaN beyond its edge. `plot_pixel_attribution` draws it.
    score, baseline_score (sample), float64, logit.
    completeness_gap (sample), float64, logit: the sum of the attribution less (score - baseline_score), 0 for
        the exact integral; completeness_gap_relative (sample): its size divided by that of the difference,
        NaN where that is 0. Above a few percent, take more steps or another baseline.

    Raises
    ------
    SpecificationError  an unknown option; a target that the tokenizer splits or cannot tell apart.
    CaptureError        the embeddings cannot be reached, or the sample has no image, or no words.
    ModelError          the model gives no logits.
    UsageError          no processor, or the model is in training mode.
    OutputExistsError   `name` is something else, or under way with other arguments.

    References
    ----------
    Sundararajan, Taly and Yan (2017), Axiomatic Attribution for Deep Networks.
    """
    asked = dict(locals())
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    from mechanistic.capture.given import given_model, given_samples
    from mechanistic.capture.path_gradients import Path, path_integral

    path = Path(to, baseline, steps, internal_batch_size, method, blur)  # type: ignore[arg-type]
    loaded = given_model(model, processor, "integrated_gradients(model, samples, processor=processor)")
    given = given_samples(samples)
    sweep = named_sweep("integrated_gradients", asked, loaded, given)
    if sweep.held is not None:
        return sweep.held

    def integrate(sample: Any, place: int) -> SampleAttribution:
        return _attribution(sample, path_integral(loaded, sample, place, target, path))

    found = attribute_each(sweep, given, integrate, quiet=quiet)
    table = attribution_table(found, dim="patch" if to == "pixels" else "token", attrs=_ATTRS)
    if to == "pixels":
        table = table.merge(_pixel_maps(found)).assign_attrs(patch_size=int(found[0].beside["patch"]))
    table = table.assign_attrs(
        analysis="integrated_gradients",
        to=to,
        baseline=baseline,
        steps=steps,
        method=method,
        **({"blur": blur} if baseline == "blurred" else {}),
        captum=version("captum"),
        **model_attributes(loaded),
    )
    return sweep.keep(table)


def _attribution(sample: Any, found: Any) -> SampleAttribution:
    """Of a sample, its path integral with the completeness gap, absolute and relative."""
    change = found.score - found.baseline_score
    gap = found.total - change
    beside: dict[str, Any] = {}
    if found.maps:
        places, patch = np.array(found.places, np.int32), np.array(found.patch)
        beside = {"maps": _stacked(found.maps), "places": places, "patch": patch}
    return SampleAttribution(
        {"integrated_gradients": found.values},
        found.labels,
        {
            "sample_id": sample.sample_id,
            "target": found.target,
            "score": found.score,
            "baseline_score": found.baseline_score,
            "completeness_gap": gap,
            "completeness_gap_relative": abs(gap) / abs(change) if change else np.nan,
        },
        beside,
    )


def _stacked(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Maps (y, x) as one array, each in the upper left corner of the largest, NaN beyond its edge."""
    height, width = (max(each.shape[axis] for each in maps) for axis in (0, 1))
    values = np.full((len(maps), height, width), np.nan, np.float32)
    for place, each in enumerate(maps):
        values[place, : each.shape[0], : each.shape[1]] = each
    return values


def _pixel_maps(found: Sequence[SampleAttribution]) -> xr.Dataset:
    """The maps of all samples."""
    values = _stacked([each for one in found for each in one.beside["maps"]])
    at = [(sample, *place) for sample, one in enumerate(found) for place in one.beside["places"]]
    names = ("canvas_sample_index", "canvas_image_index", "canvas_tile")
    labels = zip(names, np.array(at, np.int32).T, strict=True)
    return xr.Dataset(
        {"pixel_attribution": (("canvas", "y", "x"), values, _ATTRS["pixel_attribution"])},
        {name: ("canvas", column) for name, column in labels},
    )
