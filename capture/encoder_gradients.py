"""What the layers of the image encoder put out for one sample, and how the answer changes with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError, DataError, SpecificationError

from .anatomy import Stack
from .dataset import Sample
from .models import LoadedModel
from .residual import first_tensor
from .targeted_sample import TargetedSample, frozen, target_sample
from .token_table import Columns


@dataclass(frozen=True)
class EncoderLayer:
    """Output of one encoder layer and the gradient of the target to it, (encoder token, d_model), float32."""

    layer: int
    output: NDArray[np.float32]
    gradient: NDArray[np.float32]
    labels: Columns
    target: str
    score: float


def encoder_layer(
    loaded: LoadedModel, sample: Sample, sample_index: int, target: Any, stack: str, layer: int | None
) -> EncoderLayer:
    """The encoder layer of the given number; None means the last whose patches the answer depends on.

    Found by gradient: LLaVA reads the last layer but one, CLIP nothing of its last but the class token.

    Raises
    ------
    SpecificationError    there is no such layer.
    DataError             the answer does not depend on the patches of the layer, or of any.
    CaptureError          the sample has no image, or the layers give tokens that are not labelled.
    """
    asked = target_sample(loaded, sample, sample_index, target)
    if "vision" not in loaded.anatomy.stacks or "pixel_values" not in asked.inputs:
        raise CaptureError(
            "There is no image encoder, or the sample has no image for it.",
            "Give a model and a sample with one.",
        )
    encoder = loaded.anatomy.stack(stack)
    if not encoder.is_encoder:
        raise SpecificationError(f"'{stack}' does not encode images.", "Choose stack='vision'.")
    depth = len(encoder.layers)
    if layer is not None and not 0 <= layer < depth:
        raise SpecificationError(
            f"The image encoder has no layer {layer}.",
            f"Its layers are 0 to {depth - 1}; None finds the last used.",
        )
    with frozen(loaded.model):
        outputs, score = _outputs(asked, encoder)
        pieces = [piece for each in outputs for piece in each]
        found = iter(torch.autograd.grad(score, pieces, allow_unused=True))
    gradients = [[next(found) for _ in each] for each in outputs]
    is_patch = asked.patches["patch_row"] >= 0
    for number in range(depth - 1, -1, -1) if layer is None else [layer]:
        gradient = _rows(asked, number, gradients[number], outputs[number])
        if gradient[is_patch].any():
            output = _rows(asked, number, outputs[number], outputs[number])
            return EncoderLayer(
                number, output, gradient, asked.patches, asked.target.name, float(score.detach())
            )
    which = "any layer" if layer is None else f"layer {layer}"
    raise DataError(
        f"'{asked.target.name}' does not depend on the patches of {which} of the image encoder.",
        "Leave layer out to get the last one that is used."
        if layer is not None
        else "Check the image and the weights.",
    )


def _outputs(asked: TargetedSample, encoder: Stack) -> tuple[list[list[Tensor]], Tensor]:
    """The outputs of each layer, in the order of its calls, and the target; all in one graph."""
    outputs: list[list[Tensor]] = [[] for _ in encoder.layers]

    def keep(into: list[Tensor]) -> Callable[[Any, Any, Any], None]:
        return lambda _, args, output: into.append(first_tensor(output))

    # Parameters are frozen: the graph begins at the pixels.
    pixels = asked.inputs["pixel_values"].detach().clone().requires_grad_()
    with ExitStack() as hooks:
        for layer, into in zip(encoder.layers, outputs, strict=True):
            hooks.callback(layer.register_forward_hook(keep(into)).remove)
        score = asked.scores(pixel_values=pixels)[0]
    return outputs, score


def _rows(
    asked: TargetedSample, layer: int, parts: list[Tensor | None] | list[Tensor], like: list[Tensor]
) -> NDArray[np.float32]:
    """Tensors of one layer as rows in the order of the encoder's token table; zeros where there is none."""
    rows = [
        (torch.zeros_like(own) if part is None else part.detach()).reshape(-1, own.shape[-1])
        for part, own in zip(parts, like, strict=True)
    ]
    found: NDArray[np.float32] = torch.cat(rows).float().cpu().numpy() if rows else np.zeros((0, 0), "f4")
    if len(found) != len(asked.patches["position"]):
        raise CaptureError(
            f"Layer {layer} of the image encoder gives {len(found)} tokens, of which "
            f"{len(asked.patches['position'])} are known by their place.",
            "This architecture needs an adapter; until it has one, its patches cannot be named.",
        )
    return found
