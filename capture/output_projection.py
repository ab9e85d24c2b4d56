"""Which matrix turns the outputs of a layer's heads into what its attention adds to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .residual import Halves, first_tensor, relative_error


@dataclass(frozen=True)
class OutputProjection:
    """A module with weight W_O (d_model, head x d_head), by which `child` of the layer gives W_O z + bias."""

    module: nn.Module
    transposed: bool
    child: str

    @property
    def weight(self) -> Tensor:
        """(d_model, head x d_head)."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.detach().T if self.transposed else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """(d_model), where there is one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


@dataclass(frozen=True)
class MeasuredProjection(OutputProjection):
    """A module whose weight is quantised, packed or kept elsewhere: what it does is read off by running it.

    `like` is one row of what it is given.
    """

    like: Tensor

    @property
    def weight(self) -> Tensor:
        """(d_model, head x d_head): what it gives for each row of the identity."""
        identity = torch.eye(self.like.shape[-1], dtype=self.like.dtype, device=self.like.device)
        return (self.run(identity) - self.bias).T

    @property
    def bias(self) -> Tensor:
        """(d_model): what it gives for nothing, 0 without a bias."""
        return self.run(torch.zeros_like(self.like))[0]

    def run(self, rows: Tensor) -> Tensor:
        """What it gives for these rows (row, head x d_head)."""
        with torch.no_grad():
            # Not by calling the module, whose hooks are at work.
            return first_tensor(self.module.forward(rows))


class ProjectionProbe:
    """Finds the output projection of one layer in one forward, by what goes in and what comes out.

    `found` stays None where no module reads the heads' outputs as they are, its output is not one matrix of
    them, or no child of the layer gives that output as it is; `reason` then says which.
    """

    def __init__(self, layer: nn.Module, tolerance: float) -> None:
        self.layer = layer
        self.tolerance = tolerance
        self.found: OutputProjection | None = None
        self.reason = "no module reads the outputs of its heads as they are"
        self._heads: Tensor | None = None
        self._matrix: OutputProjection | None = None
        self._projected: Tensor | None = None

    def attended(self, heads: Tensor) -> None:
        """Show the outputs of the heads (batch, token, head, d_head), before the layer goes on with them."""
        self._heads = heads.flatten(0, -3).flatten(1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look for it during the forward inside the block."""
        with ExitStack() as hooks:
            for module in self.layer.modules():
                if self.may_project(module):
                    hooks.callback(module.register_forward_hook(self._linear).remove)
            for name, child in self.layer.named_children():
                hooks.callback(child.register_forward_hook(self._child(name)).remove)
            yield
        self._heads = self._projected = None

    def may_project(self, module: nn.Module) -> bool:
        """Whether a module is worth looking at."""
        weight = getattr(module, "weight", None)
        return getattr(weight, "ndim", 0) == 2 or "linear" in type(module).__name__.lower()

    def matrices(self, module: nn.Module, given: Tensor) -> Iterator[OutputProjection]:
        """What a module that was given this may multiply it with."""
        weight: Any = getattr(module, "weight", None)
        # A kind of tensor of its own means something else by its values than they are.
        if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
            for transposed in (False, True):
                matrix = OutputProjection(module, transposed, "")
                if matrix.weight.shape[-1] == given.shape[-1]:
                    yield matrix
        yield MeasuredProjection(module, False, "", given.detach().reshape(-1, given.shape[-1])[:1].clone())

    def gathered(self, given: Tensor) -> Tensor:
        """What a module was given, with what its other processes were given of the same."""
        return given

    def _linear(self, module: nn.Module, args: Any, output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        output = first_tensor(output)
        if self._matrix or self._heads is None or given is None or given.numel() != self._heads.numel():
            return
        if given.shape[-1] != self._heads.shape[-1] or not torch.equal(
            given.reshape(self._heads.shape), self._heads
        ):
            return
        self.reason = "its output projection is not one matrix"
        given = self.gathered(given)
        for matrix in self.matrices(module, given):
            expected = given @ matrix.weight.T + (0 if matrix.bias is None else matrix.bias)
            if expected.shape == output.shape and relative_error(expected, output) <= self.tolerance:
                self._matrix, self._projected = matrix, output.detach()
                self.reason = "what its output projection gives is changed before it is added"
                return

    def _child(self, name: str) -> Callable[..., None]:
        def compare(_: nn.Module, args: Any, output: Any) -> None:
            given = first_tensor(output)
            if self._matrix is None or self._projected is None or self.found is not None:
                return
            if isinstance(given, Tensor) and given.numel() == self._projected.numel():
                same = given.detach().reshape(self._projected.shape)
                if relative_error(same, self._projected) <= self.tolerance:
                    self.found = replace(self._matrix, child=name)

        return compare


def projection_problem(probe: ProjectionProbe, halves: Halves | None) -> str | None:
    """Why what the heads of a layer write into the residual stream is not known; None where it is."""
    if halves is None:
        return "no two modules of a layer add up to it"
    if probe.found is None:
        return probe.reason
    if halves.middle is not None or halves.attention != probe.found.child:
        return "what attention gives is normed or scaled before it is added to the residual stream"
    return None
