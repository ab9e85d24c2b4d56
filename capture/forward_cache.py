"""What AttentionCache and ActivationCache share: entries of modules, forward after forward, and hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import SpecificationError, UsageError

from .hooks import ForwardInputs, Hooks, watch_inputs

Kept = TypeVar("Kept")


class ForwardCache(Generic[Kept]):
    """Keeps an entry of each watched module for each of its runs, and the tokens of each forward.

    A subclass says in `_registers` which of its methods attaches it, and in `_resolve` what a name means.
    """

    _registers: str
    _resolve: Callable[[nn.Module, str], str]

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._removal = ExitStack()
        self._kept: dict[str, list[Kept]] = {}
        self._inputs: list[ForwardInputs] = []

    def _attach(self, model: nn.Module, paths: Sequence[str], attach: Callable[[ExitStack], None]) -> Hooks:
        """Put hooks on, all or none; those of an earlier registration come off first."""
        self.remove_hooks()
        if model is not self._model:
            self._kept, self._inputs = {}, []
        self._model = model
        self._kept |= {path: self._kept.get(path, []) for path in paths}
        with ExitStack() as attached:
            attached.callback(watch_inputs(model, weakly(self._keep_inputs)).remove)
            attach(attached)
            self._removal = attached.pop_all()
        weakref.finalize(self, self._removal.close)
        return Hooks(paths, self._removal)

    def _keep_inputs(self, inputs: ForwardInputs) -> None:
        self._inputs.append(inputs)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the modules that have been watched."""
        return tuple(self._kept)

    def clear(self) -> None:
        """Forget what was kept; hooks stay on."""
        self._kept = {path: [] for path in self._kept}
        self._inputs = []

    def remove_hooks(self) -> None:
        """Take the hooks off; the model is exactly as it was. What was kept stays."""
        self._removal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove_hooks()

    def _entry(self, name: str, forward: int) -> tuple[str, Kept]:
        """The path that a name means, and its entry of one run. Raises what `get` says."""
        path = name if name in self._kept else type(self)._resolve(self._attached(), name)
        if path not in self._kept:
            raise SpecificationError(f"'{name}' is not watched.", f"Watched are: {', '.join(self._kept)}.")
        runs = self._kept[path]
        if not -len(runs) <= forward < len(runs):
            raise UsageError(
                f"'{name}' has run {len(runs)} times since it was registered or cleared; "
                f"forward={forward} is not among them.",
                "Run the model while the hooks are on.",
            )
        return path, runs[forward]

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise UsageError(
                "This cache is not attached to a model.", f"Call {self._registers}(model) first."
            )
        return self._model


def weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """Call a method, `first` ahead, while its object lives: one that is thrown away collects no more."""
    reference = weakref.WeakMethod(method)

    def call(*rest: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*first, *rest)

    return call


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A numpy array; bfloat16, which numpy lacks, as float32."""
    array: NDArray[Any] = np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return array
