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

from .anatomy import CROSS
from .attention_editor import Editor
from .attention_rows import block_bytes_on, row_blocks
from .decoder_inputs import DecoderInputs, changed_decoder_inputs
from .tap import AttentionCall, tapped
from .targeted_sample import TargetedSample, frozen
from .token_table import Columns


class _Watch(Editor):
    """Keeps each layer's call, and its heads' outputs in the graph; it changes nothing."""

    def __init__(self, layers: dict[nn.Module, tuple[str, int]]) -> None:
        self.layers = layers
        # By layer, and in a layer that has both, cross-attention after its own.
        self.calls: dict[tuple[int, str], AttentionCall] = {}
        self.outputs: dict[tuple[int, str], Tensor] = {}

    def _place(self, module: nn.Module) -> tuple[int, str]:
        name, layer = self.layers[module]
        return layer, name

    def __call__(self, call: AttentionCall) -> None:
        if call.module in self.layers:
            self.calls[self._place(call.module)] = call

    def after(self, module: nn.Module, output: Tensor) -> Tensor:
        if module in self.layers:
            self.outputs[self._place(module)] = output
        return output


def relevancy_rows(
    asked: TargetedSample, rows: Sequence[NDArray[np.int64]], layers: Sequence[int] | None = None
) -> tuple[NDArray[np.float32], float]:
    """Relevancy (row, token) of every token for each row, and the target's value.

    A_l = mean_h max(0, dF/dA[l, h] * A[l, h]); R = (I + A_L) ... (I + A_1); a row is the mean of those of R
    at its positions. Tokens that the decoder reads by cross-attention come last; see `relevancy_labels`.

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
    depth = len(asked.loaded.anatomy.stack("text").layers)
    if layers is not None and (missing := sorted(set(layers) - set(range(depth)))):
        raise SpecificationError(
            f"The decoder has no layer {', '.join(map(str, missing))}.", f"Its layers are 0 to {depth - 1}."
        )
    wanted = sorted(place for place in watch.calls if layers is None or place[0] in layers)
    gradients = torch.autograd.grad(score, [watch.outputs[place] for place in wanted], allow_unused=True)
    state = torch.zeros(len(rows), len(asked.tokens["position"]), dtype=torch.float64)
    across = torch.zeros(len(rows), _read_across(asked), dtype=torch.float64)
    for row, positions in enumerate(rows):
        state[row, torch.from_numpy(positions)] = 1 / len(positions)
    for place, gradient in zip(reversed(wanted), reversed(gradients), strict=True):
        if gradient is None:
            continue
        below = _below(state, watch.calls[place], gradient[0])
        if place[1].endswith(CROSS):
            across = across + below
        else:
            state = state + below
    return torch.cat([state, across], dim=1).float().numpy(), float(score.detach())


def relevancy_labels(asked: TargetedSample) -> Columns:
    """The labels of the tokens of `relevancy_rows`: the decoder's, then those that it reads across."""
    tokens, across = asked.labelled_tokens, asked.labelled_across
    if across is None:
        return tokens
    return {name: np.concatenate([values, across[name]]) for name, values in tokens.items()}


def _read_across(asked: TargetedSample) -> int:
    """How many tokens the decoder reads by cross-attention."""
    return 0 if asked.across is None else len(asked.across["position"])


def _attended(asked: TargetedSample) -> tuple[_Watch, Tensor]:
    """Every layer's attention in one forward whose graph begins at the decoder's inputs."""
    loaded = asked.loaded
    stack = loaded.anatomy.stack("text")
    watch = _Watch(loaded.anatomy.module_layers(["text", f"text{CROSS}"]))

    def start(given: DecoderInputs) -> DecoderInputs:
        return DecoderInputs(given.embeddings.detach().clone().requires_grad_(), given.deepstack)

    with (
        frozen(loaded.model),
        changed_decoder_inputs(loaded.model, start),
        tapped(loaded.model, watch, watch),
    ):
        score = asked.scores()[0]
    total = len(asked.tokens["position"])
    for cross in (False, True):
        keys = _read_across(asked) if cross else total
        for layer in stack.attending(cross=cross):
            call = watch.calls.get((layer, f"text{CROSS}" if cross else "text"))
            if call is None or call.query.shape[2] != total or call.key.shape[2] != keys:
                raise CaptureError(
                    f"text.{layer}: attention from the {total} tokens of the prompt cannot be seen.",
                    "This architecture needs an adapter; until it has one, use integrated_gradients.",
                )
    return watch, score


@torch.no_grad()
def _below(state: Tensor, call: AttentionCall, gradient: Tensor) -> Tensor:
    """state @ A of one layer, (row, key), from the gradient (query, head, d_head) of its heads' outputs."""
    keys, heads = call.key.shape[2], call.query.shape[1]
    # What carries nothing passes nothing on; in the top layer that is all but a few rows.
    queries = torch.nonzero(state.any(0))[:, 0]
    value = call.value[0].float().repeat_interleave(heads // call.value.shape[1], dim=0)
    below = torch.zeros(len(state), keys, dtype=state.dtype)
    limit = block_bytes_on(value.device)
    for block in row_blocks(call, 0, queries, keys, ahead=True, block_bytes=limit):
        here = queries[block.rows]
        change = gradient[here.to(gradient.device)].float().transpose(0, 1) @ value.transpose(1, 2)
        matrix = (change * block.weights).clamp_min(0).nan_to_num(0).mean(0)
        below += state[:, here] @ matrix.double().cpu()
    return below
