"""Integrated gradients of one sample, to its pixels, its image tokens or its words, by captum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError, SpecificationError
from mechanistic.store.schema import KIND

from .baselines import Baseline, check_baseline, image_baseline, pixel_baseline, word_baseline
from .dataset import Sample
from .decoder_inputs import DecoderInputs, changed_decoder_inputs
from .models import LoadedModel
from .pixel_canvases import canvases_of
from .targeted_sample import TargetedSample, frozen, target_sample
from .token_table import Columns

To = Literal["pixels", "image_embeddings", "token_embeddings"]
Method = Literal["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
Scores = Callable[..., Tensor]


@dataclass(frozen=True)
class Path:
    """What is integrated, how finely, and from where."""

    to: To = "image_embeddings"
    baseline: Baseline = "mean"
    steps: int = 50
    internal_batch_size: int = 8
    method: Method = "gausslegendre"
    blur: float = 0.125

    def __post_init__(self) -> None:
        check_baseline(self.baseline, self.blur)
        for name, value, known in (("to", self.to, To), ("method", self.method, Method)):
            if value not in get_args(known):
                raise SpecificationError(
                    f"Integrated gradients has no {name}={value!r}.",
                    f"Choose of {', '.join(get_args(known))}.",
                )
        if self.steps < 1 or self.internal_batch_size < 1:
            raise SpecificationError(
                f"steps={self.steps}, internal_batch_size={self.internal_batch_size}.",
                "Both are 1 or more; 50 steps are usual.",
            )


@dataclass(frozen=True)
class PathIntegral:
    """The attribution of each labelled row, and the target at both ends of the path.

    `maps` are, to pixels, the attribution of each pixel of each canvas (y, x), `places` their images and
    tiles, and `patch` the side of the encoder's patches on them.
    """

    values: NDArray[np.float32]
    labels: Columns
    target: str
    score: float
    baseline_score: float
    total: float
    maps: tuple[NDArray[np.float32], ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    patch: int = 0


def path_integral(
    loaded: LoadedModel, sample: Sample, sample_index: int, target: Any, path: Path
) -> PathIntegral:
    """Integrate along the path of one sample; raises as `target_sample`, or CaptureError."""
    asked = target_sample(loaded, sample, sample_index, target)
    with frozen(loaded.model):
        return _to_pixels(asked, path) if path.to == "pixels" else _to_embeddings(asked, path)


def _to_pixels(asked: TargetedSample, path: Path) -> PathIntegral:
    canvases = canvases_of(asked)
    values = asked.inputs["pixel_values"]
    if path.baseline == "zero" and "pixel_attention_mask" in asked.inputs:
        raise SpecificationError(
            "This model takes a tile of zeros for padding and leaves it out.",
            "Choose baseline='mean' or baseline='blurred'.",
        )

    def scores(pixels: Tensor) -> Tensor:
        return asked.scores(len(pixels), pixel_values=pixels.flatten(0, 1).to(values.dtype))

    start = pixel_baseline(values, canvases, path.baseline, path.blur)
    (found,), ends = _integrate(scores, (values.float(),), (start,), path)
    maps = tuple(np.asarray(canvas.sum(0)) for canvas in canvases.split(found[0]))
    labels = asked.patches
    return PathIntegral(
        canvases.patch_sums(maps, labels),
        labels,
        asked.target.name,
        *ends,
        float(found.double().sum()),
        maps,
        canvases.places,
        canvases.patch,
    )


def _to_embeddings(asked: TargetedSample, path: Path) -> PathIntegral:
    if not asked.loaded.model.can_generate():
        raise CaptureError(
            f"{type(asked.loaded.model).__name__} has no decoder that could be given other embeddings.",
            "Choose to='pixels'.",
        )
    if path.to == "image_embeddings" and asked.across is not None:
        return _to_across(asked, path)
    kind = "image" if path.to == "image_embeddings" else "text"
    chosen = np.flatnonzero(asked.tokens["kind"] == KIND[kind])
    if not len(chosen):
        what = "There are no image tokens among the words" if kind == "image" else "The question has no words"
        raise CaptureError(f"{what}, so there is nothing to attribute to.", f"Choose another to={path.to!r}.")
    labels = {name: values[chosen] for name, values in asked.labelled_tokens.items()}
    own = _own_inputs(asked)
    place = torch.from_numpy(chosen).to(own.embeddings.device)
    if kind == "image":
        parts = (own.embeddings[0, place], *own.deepstack)
        starts = tuple(image_baseline(part, labels, path.baseline, path.blur) for part in parts)
    else:
        parts = (own.embeddings[0, place],)
        starts = (word_baseline(asked, parts[0], path.baseline),)

    def scores(*changed: Tensor) -> Tensor:
        def change(given: DecoderInputs) -> DecoderInputs:
            embeddings = given.embeddings.detach().clone()
            embeddings[:, place] = changed[0].to(embeddings.dtype)
            higher = tuple(
                part.flatten(0, 1).to(was.dtype)
                for part, was in zip(changed[1:], given.deepstack, strict=kind == "image")
            )
            return DecoderInputs(embeddings, higher)

        with changed_decoder_inputs(asked.loaded.model, change):
            return asked.scores(len(changed[0]))

    return _of_rows(asked, labels, scores, parts, starts, path)


def _to_across(asked: TargetedSample, path: Path) -> PathIntegral:
    """To what the decoder reads of the image by cross-attention."""
    labels, across = asked.labelled_across, _own_inputs(asked).across
    if labels is None or across is None or across.shape[1] != len(labels["position"]):
        raise CaptureError(
            f"{type(asked.loaded.model).__name__} was not seen to read the image by cross-attention.",
            "Choose to='pixels'.",
        )
    part = across[0]

    def scores(changed: Tensor) -> Tensor:
        def change(given: DecoderInputs) -> DecoderInputs:
            return replace(given, across=changed.to(part.dtype))

        with changed_decoder_inputs(asked.loaded.model, change):
            return asked.scores(len(changed))

    start = image_baseline(part, labels, path.baseline, path.blur)
    return _of_rows(asked, labels, scores, (part,), (start,), path)


def _of_rows(
    asked: TargetedSample,
    labels: Columns,
    scores: Scores,
    parts: tuple[Tensor, ...],
    starts: tuple[Tensor, ...],
    path: Path,
) -> PathIntegral:
    """The attribution of rows (token, feature), summed over features and over the parts."""
    found, ends = _integrate(scores, tuple(part.float() for part in parts), starts, path)
    values = torch.stack([part[0].sum(-1) for part in found]).sum(0).cpu().numpy()
    total = float(sum(part.double().sum() for part in found))
    return PathIntegral(values, labels, asked.target.name, *ends, total)


def _own_inputs(asked: TargetedSample) -> DecoderInputs:
    """What the decoder is given of the sample as it is."""
    seen: list[DecoderInputs] = []

    def see(given: DecoderInputs) -> DecoderInputs:
        seen.append(given)
        return given

    with torch.no_grad(), changed_decoder_inputs(asked.loaded.model, see):
        asked.scores()
    return seen[0]


def _integrate(
    scores: Scores, inputs: tuple[Tensor, ...], baselines: tuple[Tensor, ...], path: Path
) -> tuple[tuple[Tensor, ...], tuple[float, float]]:
    """The attribution of each input, with one more axis in front, and the scores of inputs and baselines."""
    from captum.attr import IntegratedGradients

    with torch.no_grad():
        ends = scores(*(torch.stack(pair) for pair in zip(inputs, baselines, strict=True))).tolist()
    found: tuple[Tensor, ...] = IntegratedGradients(scores).attribute(
        tuple(value[None] for value in inputs),
        tuple(value[None] for value in baselines),
        n_steps=path.steps,
        method=path.method,
        internal_batch_size=path.internal_batch_size,
    )
    return found, (ends[0], ends[1])
