"""What is attached to a model, and comes off again as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Hooks:
    """The hooks that one registration made; iterates over the paths of the modules that it watches."""

    def __init__(self, names: Sequence[str], removal: ExitStack) -> None:
        self.names = tuple(names)
        self._removal = removal

    def remove(self) -> None:
        """Take all of them off; a second time does nothing."""
        self._removal.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True)
class ForwardInputs:
    """The tokens that a forward was given, (sample, token) on the host, as far as it was given any."""

    token_ids: Tensor | None
    attention_mask: Tensor | None


def watch_inputs(model: nn.Module, seen: Callable[[ForwardInputs], None]) -> Any:
    """Show the tokens of every forward of the whole model; returns the hook's handle."""
    signature = inspect.signature(model.forward)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        seen(ForwardInputs(_kept(given.get("input_ids")), _kept(given.get("attention_mask"))))

    return model.register_forward_pre_hook(enter, with_kwargs=True)


def _kept(value: Any) -> Tensor | None:
    return on_host(value) if isinstance(value, Tensor) and value.ndim == 2 else None


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory that no later forward can change."""
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())
