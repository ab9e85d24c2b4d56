"""Grad-CAM of vision transformers: which patches of the encoder's last used layer speak for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .attribution_table import (
    Arrays,
    SampleAttribution,
    attribute_each,
    attribution_table,
    model_attributes,
)
from .sweep import named_sweep

_ATTRS = {
    "gradcam": {"units": "logit", "long_name": "Grad-CAM"},
    "score": {"units": "logit", "long_name": "target of the sample"},
    "layer": {"long_name": "layer of the image encoder"},
}


def gradcam(
    model: Any,
    samples: Any,
    *,
    target: str | int | tuple[str | int, str | int] | None = None,
    stack: str = "vision",
    layer: int | None = None,
    relu: bool = True,
    processor: Any = None,
    name: str | Path | None = None,
    quiet: bool = False,
) -> xr.Dataset:
    """Grad-CAM on the patches of an image encoder: cam_p = max(0, sum_c w_c A_pc), w_c = mean_p dF / dA_pc.

    A_pc is channel c of patch p in the output of the layer, F a logit at the last prompt token or the
    difference of two. Class tokens and registers take no part; images and tiles each have their own w.

    Parameters
    ----------
    model, samples, target, processor
        As in `integrated_gradients`.
    stack
        The encoder: Mllama has ``"vision_global"`` besides.
    layer
        True number. None finds the last layer whose patches the target depends on, by gradient: LLaVA reads
        the last layer but one, CLIP of its last layer the class token alone.
    relu
        Whether patches that speak against the target become 0.
    name
        Where to keep the result, see `integrated_gradients`.

    Returns
    -------
    gradcam (patch), float32, logit; all tokens of the encoder that are patches, of all samples end to end,
        labelled as in a run: sample_index, image_index, tile, patch_row, patch_col, box_x0 to box_y1.
    score (sample), float64, logit; layer (sample), the layer that was used, as a coordinate.

    Raises
    ------
    SpecificationError  no such layer, no encoder, or a target that the tokenizer splits or cannot tell apart.
    DataError           the target does not depend on the patches of that layer.
    CaptureError        no image encoder, no image, or patches whose place is not known.
    ModelError          the model gives no logits, or has no such stack.
    UsageError          no processor, or the model is in training mode.

    References
    ----------
    Selvaraju et al. (2017), Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization.
    """
    asked = dict(locals())
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    from mechanistic.capture.encoder_gradients import encoder_layer
    from mechanistic.capture.given import given_model, given_samples

    loaded = given_model(model, processor, "gradcam(model, samples, processor=processor)")
    given = given_samples(samples)
    sweep = named_sweep("gradcam", asked, loaded, given)
    if sweep.held is not None:
        return sweep.held

    def attribute(sample: Any, place: int) -> SampleAttribution:
        found = encoder_layer(loaded, sample, place, target, stack, layer)
        rows = np.flatnonzero(found.labels["patch_row"] >= 0)
        labels = {name: values[rows] for name, values in found.labels.items()}
        cam = _gradcam(found.output[rows], found.gradient[rows], _images(labels))
        once = {"target": found.target, "layer": found.layer, "score": found.score}
        return SampleAttribution(
            {"gradcam": np.maximum(cam, 0) if relu else cam}, labels, {"sample_id": sample.sample_id, **once}
        )

    table = attribution_table(attribute_each(sweep, given, attribute, quiet=quiet), dim="patch", attrs=_ATTRS)
    attrs = {"analysis": "gradcam", "stack": stack, "relu": int(relu), **model_attributes(loaded)}
    return sweep.keep(table.assign_attrs(attrs))


def _images(labels: Arrays) -> NDArray[np.int64]:
    """A number for each image or tile that a patch belongs to."""
    places = np.stack([labels["image_index"], labels["tile"]], axis=1)
    return np.asarray(np.unique(places, axis=0, return_inverse=True)[1].reshape(-1))


def _gradcam(
    output: NDArray[np.float32], gradient: NDArray[np.float32], image: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(patch, channel) twice and the image of each patch -> (patch,), before the ReLU."""
    counts = np.bincount(image)
    sums = np.zeros((len(counts), gradient.shape[1]))
    np.add.at(sums, image, gradient)
    weights = sums / counts[:, None]
    cam: NDArray[np.float64] = np.einsum("pc,pc->p", output, weights[image])
    return cam.astype(np.float32)
