"""Gradient x attention relevancy of one sample, a few rows of it, walked from the top layer down.

Neither a matrix over all tokens nor the weights of a layer are held. What an answer F says of a weight is
dF / dA[h, q, k] = dF / dz[h, q] . v[h, k], so that the gradient of each head's output z is all that autograd
has to give, whatever kernel computed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, SpecificationError

from .asked import Asked, frozen
from .attention_rows import block_bytes_on, row_blocks
from .decoder_inputs import DecoderInputs, changed_decoder_inputs
from .tap import AttentionCall, tapped


class _Watch:
    """Keeps each layer's call, and its heads' outputs in the graph; as an `Editor` it changes nothing."""

    def __init__(self, layers: dict[nn.Module, tuple[str, int]]) -> None:
        self.layers = layers
        self.calls: dict[int, AttentionCall] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        if call.module in self.layers:
            self.calls[self.layers[call.module][1]] = call

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return query, key, value, mask

    def edits_weights(self, module: nn.Module) -> bool:
        return False

    def scores(self, module: nn.Module, scores: Tensor) -> Tensor:
        return scores

    def pattern(self, module: nn.Module, pattern: Tensor) -> Tensor:
        return pattern

    def after(self, module: nn.Module, output: Tensor) -> Tensor:
        if module in self.layers:
            self.outputs[self.layers[module][1]] = output
        return output


def relevancy_rows(
    asked: Asked, rows: Sequence[NDArray[np.int64]], layers: Sequence[int] | None = None
) -> tuple[NDArray[np.float32], float]:
    """Relevancy (row, token) of every token for each row, and the target's value.

    A_l = mean_h max(0, dF/dA[l, h] * A[l, h]); R = (I + A_L) ... (I + A_1); a row is the mean of those of R
    at its positions.

    Parameters
    ----------
    layers
        Only these; None means all.

    Raises
    ------
    SpecificationError    there is no such layer.
    CaptureError          the model writes no text, or a layer attends by code that cannot be seen.
    """
    if not asked.loaded.model.can_generate():
        raise CaptureError(
            f"{type(asked.loaded.model).__name__} has no decoder whose words attend to the image.",
            "Choose gradcam, or integrated_gradients(..., to='pixels').",
        )
    watch, score = _attended(asked)
    wanted = sorted(watch.calls if layers is None else set(layers))
    if missing := [layer for layer in wanted if layer not in watch.calls]:
        raise SpecificationError(
            f"The decoder has no layer {', '.join(map(str, missing))}.",
            f"Its layers are 0 to {len(watch.calls) - 1}.",
        )
    gradients = torch.autograd.grad(score, [watch.outputs[layer] for layer in wanted], allow_unused=True)
    total = len(asked.tokens["position"])
    state = torch.zeros(len(rows), total, dtype=torch.float64)
    for row, positions in enumerate(rows):
        state[row, torch.from_numpy(positions)] = 1 / len(positions)
    for layer, gradient in zip(reversed(wanted), reversed(gradients), strict=True):
        if gradient is not None:
            state = state + _below(state, watch.calls[layer], gradient[0])
    return state.float().numpy(), float(score.detach())


def _attended(asked: Asked) -> tuple[_Watch, Tensor]:
    """Every layer's attention in one forward whose graph begins at the decoder's inputs."""
    loaded = asked.loaded
    watch = _Watch(loaded.anatomy.module_layers(["text"]))

    def start(given: DecoderInputs) -> DecoderInputs:
        return DecoderInputs(given.embeddings.detach().clone().requires_grad_(), given.deepstack)

    with (
        frozen(loaded.model),
        changed_decoder_inputs(loaded.model, start),
        tapped(loaded.model, watch, watch),
    ):
        score = asked.scores()[0]
    total = len(asked.tokens["position"])
    for layer in range(len(loaded.anatomy.stack("text").layers)):
        call = watch.calls.get(layer)
        if call is None or call.query.shape[2] != total or call.key.shape[2] != total:
            raise CaptureError(
                f"text.{layer}: attention among the {total} tokens of the prompt cannot be seen.",
                "This architecture needs an adapter; until it has one, use integrated_gradients.",
            )
    return watch, score


@torch.no_grad()
def _below(state: Tensor, call: AttentionCall, gradient: Tensor) -> Tensor:
    """state @ A of one layer, from the gradient (query, head, d_head) of its heads' outputs."""
    total, heads = state.shape[1], call.query.shape[1]
    # What carries nothing passes nothing on; in the top layer that is all but a few rows.
    queries = torch.nonzero(state.any(0))[:, 0]
    value = call.value[0].float().repeat_interleave(heads // call.value.shape[1], dim=0)
    below = torch.zeros_like(state)
    limit = block_bytes_on(value.device)
    for block in row_blocks(call, 0, queries, total, ahead=True, block_bytes=limit):
        here = queries[block.rows]
        change = gradient[here.to(gradient.device)].float().transpose(0, 1) @ value.transpose(1, 2)
        matrix = (change * block.weights).clamp_min(0).nan_to_num(0).mean(0)
        below += state[:, here] @ matrix.double().cpu()
    return below
