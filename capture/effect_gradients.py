"""Gradients of a metric with respect to what is inside the decoder, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .interventions import Edit
from .targeted_sample import frozen
from .trial import Metric, Trial


@dataclass(frozen=True)
class _Leaf:
    """Adds zeros of which gradients are wanted, so that the graph of lower layers stays whole."""

    leaves: dict[tuple[int, str], Tensor]
    name: tuple[int, str]

    def __call__(self, tensor: Tensor) -> Tensor:
        leaf = torch.zeros_like(tensor, requires_grad=True)
        self.leaves[self.name] = leaf
        return tensor + leaf


@dataclass(frozen=True)
class _Interpolated:
    """x + share (source - x)."""

    source: Tensor
    share: float

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + self.share * (self.source.to(tensor.dtype) - tensor)


@dataclass(frozen=True)
class Steps:
    """Where gradients are taken: at the base (none), or on the way of the decoder's input to the source.

    With n steps they are averaged over the inputs x + k / n (source - x), k = 1 to n.
    """

    count: int = 0
    source: Tensor | None = field(default=None, compare=False)

    def inputs(self) -> list[list[Edit]]:
        """The edits of each step."""
        if self.source is None:
            return [[]]
        return [
            [Edit("text", 0, "resid_pre", _Interpolated(self.source, step / self.count))]
            for step in range(1, self.count + 1)
        ]


def effect_gradients(
    trial: Trial, sites: Sequence[tuple[int, str]], metric: Metric, steps: Steps
) -> dict[tuple[int, str], Tensor]:
    """d metric / d x of each (layer, site), in the shape of x (sample, token, ...).

    Each sample's metric depends on its own row alone, so one backward pass serves all samples.
    """
    total: dict[tuple[int, str], Tensor] = {}
    with frozen(trial.loaded.model):
        for edits in steps.inputs():
            leaves: dict[tuple[int, str], Tensor] = {}
            watch = [Edit("text", layer, site, _Leaf(leaves, (layer, site))) for layer, site in sites]
            value = trial.measure(metric, [*edits, *watch]).sum()
            gradients = torch.autograd.grad(value, [leaves[name] for name in sites])
            for name, gradient in zip(sites, gradients, strict=True):
                total[name] = total.get(name, 0) + gradient
    return {name: gradient / max(1, steps.count) for name, gradient in total.items()}
