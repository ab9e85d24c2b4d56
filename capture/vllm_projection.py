"""The output projection of an engine's attention, read off by running it: engines pack their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .output_projection import MeasuredProjection, OutputProjection, ProjectionProbe
from .vllm_engine import Engine


class PackedProjection(MeasuredProjection):
    """A linear module of an engine, each of whose processes reads a slice of the rows."""

    def run(self, rows: Tensor) -> Tensor:
        """See `MeasuredProjection`."""
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        own = rows.chunk(get_tensor_model_parallel_world_size(), -1)[get_tensor_model_parallel_rank()]
        return super().run(own.contiguous())


class PackedProjectionProbe(ProjectionProbe):
    """Finds such a projection."""

    def gathered(self, given: Tensor) -> Tensor:
        """See `ProjectionProbe`."""
        from vllm.distributed import tensor_model_parallel_all_gather

        whole: Tensor = tensor_model_parallel_all_gather(given)
        return whole

    def matrices(self, module: nn.Module, given: Tensor) -> Iterator[OutputProjection]:
        """The one matrix that it gives away, if it is linear at all: engines pack their weights."""
        yield PackedProjection(module, False, "", given.detach().reshape(-1, given.shape[-1])[:1].clone())


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
