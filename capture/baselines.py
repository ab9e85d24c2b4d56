"""Where the path of integrated gradients begins: nothing, the mean, or the input blurred."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import SpecificationError

from .pixel_canvases import Canvases
from .targeted_sample import TargetedSample
from .token_table import Columns

Baseline = Literal["zero", "mean", "blurred"]
Array = NDArray[np.float32]


def check_baseline(baseline: str, blur: float) -> None:
    """SpecificationError unless the baseline exists and the blur is a share."""
    if baseline not in get_args(Baseline):
        raise SpecificationError(
            f"There is no baseline {baseline!r}.", f"The baselines are {', '.join(get_args(Baseline))}."
        )
    if not 0 < blur <= 1:
        raise SpecificationError(
            f"blur={blur} is no share of the image's shorter side.", "Give one such as blur=0.125."
        )


def pixel_baseline(values: Tensor, canvases: Canvases, baseline: Baseline, blur: float) -> Tensor:
    """The baseline of `pixel_values`; zero is what the processor makes 0, its mean colour."""
    if baseline == "zero":
        return torch.zeros_like(values, dtype=torch.float32)
    if baseline == "mean":
        return canvases.replaced(
            values, lambda canvas: np.broadcast_to(canvas.mean((1, 2), keepdims=True), canvas.shape)
        )
    return canvases.replaced(
        values, lambda canvas: _blurred(canvas, np.ones(canvas.shape[1:], np.float32), blur)
    )


def image_baseline(values: Tensor, tokens: Columns, baseline: Baseline, blur: float) -> Tensor:
    """The baseline of a sample's image embeddings (token, d_model), whose labels are `tokens`.

    Tokens that stand for no patch, such as LLaVA-NeXT's newlines, stay as they are under mean and blurred;
    where none does, as behind a Q-Former, they have a mean, but no neighbours.
    """
    if baseline == "zero":
        return torch.zeros_like(values, dtype=torch.float32)
    if not (tokens["patch_row"] >= 0).any():
        if baseline == "blurred":
            raise SpecificationError(
                "The image tokens of this model have no place in the image, so they cannot be blurred.",
                "Choose baseline='mean', or to='pixels'.",
            )
        return values.float().mean(0).expand(values.shape)
    new = values.detach().float().cpu().numpy().copy()
    places = np.stack([tokens["image_index"], tokens["tile"]], axis=1)
    for place in np.unique(places[tokens["patch_row"] >= 0], axis=0):
        here = (places == place).all(1) & (tokens["patch_row"] >= 0)
        if baseline == "mean":
            new[here] = new[here].mean(0)
            continue
        row, column = tokens["patch_row"][here], tokens["patch_col"][here]
        grid = np.zeros((new.shape[1], row.max() + 1, column.max() + 1), np.float32)
        held = np.zeros(grid.shape[1:], np.float32)
        grid[:, row, column], held[row, column] = new[here].T, 1
        new[here] = _blurred(grid, held, blur)[:, row, column].T
    return torch.from_numpy(new).to(values.device)


def word_baseline(asked: TargetedSample, values: Tensor, baseline: Baseline) -> Tensor:
    """The baseline of word embeddings (token, d_model); the mean is over the model's whole vocabulary."""
    if baseline == "blurred":
        raise SpecificationError(
            "Words cannot be blurred: neighbours in a sentence are not alike as pixels are.",
            "Choose baseline='zero' or baseline='mean'.",
        )
    if baseline == "zero":
        return torch.zeros_like(values, dtype=torch.float32)
    table: Tensor = asked.loaded.model.get_input_embeddings()
    every = torch.arange(table.num_embeddings, device=values.device)  # type: ignore[attr-defined]
    with torch.no_grad():
        # Through the module itself: some scale what stands in their table.
        mean = torch.stack([table(part).float().sum(0) for part in every.split(4096)]).sum(0) / len(every)  # type: ignore[operator]
    return mean.expand(values.shape)


def _blurred(canvas: Array, held: Array, blur: float) -> Array:
    """(channel, y, x) under a Gaussian; what lies outside, or is not held, has no weight."""
    from scipy.ndimage import gaussian_filter

    sigma = blur * min(held.shape)
    weight = gaussian_filter(held, sigma, mode="constant")
    spread = gaussian_filter(canvas * held, (0, sigma, sigma), mode="constant")
    return np.asarray(spread / np.maximum(weight, 1e-12), np.float32)
