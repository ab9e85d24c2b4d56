"""What an intervention does to a tensor: put rows in their place, add, scale, project out, close keys.

Each is a frozen value that is called with the tensor and returns a new one; autograd goes through all.
`where` is an index such as (batch, position) or (batch, position, head): one integer tensor for each leading
axis, of equal length or broadcastable. None means everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Where = tuple[Tensor, ...]


def replace_rows(tensor: Tensor, where: Where, values: Tensor) -> Tensor:
    """A copy of `tensor` that has `values` at `where`; values broadcast to what is indexed."""
    index = tuple(axis.to(tensor.device) for axis in where)
    values = values.to(tensor.device, tensor.dtype)
    return tensor.index_put(index, values.expand(tensor[index].shape))


def _at(tensor: Tensor, where: Where | None) -> Tensor:
    return tensor if where is None else tensor[tuple(axis.to(tensor.device) for axis in where)]


def _put(tensor: Tensor, where: Where | None, values: Tensor) -> Tensor:
    return values if where is None else replace_rows(tensor, where, values)


@dataclass(frozen=True, eq=False)
class ReplaceRows:
    """Put other rows in the place of some: values (row, ...)."""

    where: Where
    values: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        return replace_rows(tensor, self.where, self.values)


@dataclass(frozen=True, eq=False)
class Add:
    """Add `strength` times a direction, or a direction for each row."""

    direction: Tensor
    strength: float = 1.0
    where: Where | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        rows = _at(tensor, self.where)
        return _put(tensor, self.where, rows + self.strength * self.direction.to(rows.device, rows.dtype))


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply by a factor; 0 ablates."""

    factor: float
    where: Where | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        return _put(tensor, self.where, _at(tensor, self.where) * self.factor)


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """Take away `strength` times the part that lies along a direction: x - s (x . u) u with u of length 1."""

    direction: Tensor
    strength: float = 1.0
    where: Where | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        rows = _at(tensor, self.where)
        unit = self.direction.to(rows.device, rows.dtype)
        unit = unit / unit.norm()
        along = (rows * unit).sum(-1, keepdim=True)
        return _put(tensor, self.where, rows - self.strength * along * unit)


@dataclass(frozen=True, eq=False)
class CloseKeys:
    """On scores: the queries of `closed` no longer see the keys of `closed`; the rest of a row sums to 1.

    `closed` is boolean, (batch or 1, head or 1, query, key).
    """

    closed: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.closed.to(scores.device), -float("inf"))


@dataclass(frozen=True, eq=False)
class ScaleScores:
    """On scores: multiply those of `chosen` by a factor before the softmax, as AdaptVis does.

    `chosen` is boolean, (batch or 1, head or 1, query, key).
    """

    chosen: Tensor
    factor: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.where(~self.chosen.to(scores.device), scores * self.factor)
