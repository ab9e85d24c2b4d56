"""The output projection of an engine's attention, read off by running it: engines pack their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .output_projection import OutputProjection, ProjectionProbe
from .residual import first_tensor
from .vllm_engine import Engine


@dataclass(frozen=True)
class PackedProjection(OutputProjection):
    """A linear module of an engine; `like` is one row of what its processes read, each a slice of it."""

    like: Tensor

    @property
    def weight(self) -> Tensor:
        """(d_model, head x d_head): what it gives for each row of the identity."""
        identity = torch.eye(self.like.shape[-1], dtype=self.like.dtype, device=self.like.device)
        return (self._run(identity) - self.bias).T

    @property
    def bias(self) -> Tensor:
        """(d_model): what it gives for nothing, 0 without a bias."""
        return self._run(torch.zeros_like(self.like))[0]

    def _run(self, rows: Tensor) -> Tensor:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        own = rows.chunk(get_tensor_model_parallel_world_size(), -1)[get_tensor_model_parallel_rank()]
        with torch.no_grad():
            # Not by calling the module, whose hooks are at work.
            return first_tensor(self.module.forward(own.contiguous()))


class PackedProjectionProbe(ProjectionProbe):
    """Finds such a projection."""

    def may_project(self, module: nn.Module) -> bool:
        """Whether it is a linear module, whatever became of its weight."""
        return "linear" in type(module).__name__.lower()

    def gathered(self, given: Tensor) -> Tensor:
        """See `ProjectionProbe`."""
        from vllm.distributed import tensor_model_parallel_all_gather

        whole: Tensor = tensor_model_parallel_all_gather(given)
        return whole

    def matrices(self, module: nn.Module, given: Tensor) -> list[OutputProjection]:
        """The one matrix that it gives away, if it is linear at all."""
        like = given.detach().reshape(-1, given.shape[-1])[:1].clone()
        return [PackedProjection(module, False, "", like)]


class EngineProjections(Mapping[int, OutputProjection]):
    """The output projections of an engine's layers, each fetched when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getitem__(self, layer: int) -> OutputProjection:
        from safetensors.torch import load_file

        folder = Path(self.engine.folder.name)
        self.engine.call("mechanistic_projection", str(folder), layer)
        held = load_file(folder / "projection0.safetensors")
        return OutputProjection(linear(held["weight"], held["bias"]), False, "")

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.engine.layers)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module with this weight (out, in) and bias."""
    made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    found: nn.Module = made
    return found
