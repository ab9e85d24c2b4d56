"""The residual stream inside vLLM's own layers, which hand it on in two tensors and add them in place.

A layer takes (positions, hidden_states, residual) and returns (hidden_states, residual): the stream is their
sum, and either buffer may be overwritten by the next fused kernel. So whatever is kept is a copy, made inside
the hook. Layers of transformers' own classes, with one tensor and a leading axis of 1, are read as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import ModelError

from .residual import LayerProbe, first_tensor

# One tensor, or two whose sum is meant.
Stream = tuple[Tensor, ...]


def stream_into(layer: nn.Module, args: Any, kwargs: Any, *, encoder: bool = False) -> Stream:
    """What goes into a layer, by the names of its arguments; some layers of an encoder call it x.

    Raises
    ------
    ModelError    the layer takes no hidden_states.
    """
    bound = inspect.signature(layer.forward).bind_partial(*args, **kwargs).arguments
    hidden = bound.get("hidden_states", bound.get("x") if encoder else None)
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"{type(layer).__name__} of the engine takes no hidden_states: {', '.join(bound)}.",
            "This architecture needs an adapter; try --engine-option model_impl=transformers.",
        )
    residual = bound.get("residual")
    return (hidden, residual) if isinstance(residual, Tensor) else (hidden,)


def stream_out(output: Any) -> Stream:
    """What comes out of a layer: of a pair of equally shaped tensors, both."""
    if isinstance(output, Tensor):
        return (output,)
    tensors = [part for part in output if isinstance(part, Tensor)]
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        return tensors[0], tensors[1]
    return (first_tensor(output),)


def stream_read(args: Any, kwargs: Any, width: int) -> Stream:
    """What a child of a layer reads: its floating tensors as wide as the stream, at most two."""
    found = [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == width
    ]
    return tuple(found[:2])


def flat(stream: Stream) -> Tensor:
    """A copy of the sum as (token, width)."""
    copies = [part.detach().reshape(-1, part.shape[-1]) for part in stream]
    return copies[0].clone() if len(copies) == 1 else copies[0] + copies[1]


class EngineLayerProbe(LayerProbe):
    """Finds the halves of a layer of an engine, in the first step that it sees."""

    def __init__(
        self, layer: nn.Module, tolerance: float, active: Callable[[], bool], *, encoder: bool = False
    ) -> None:
        super().__init__(layer, tolerance)
        self.active = active
        self.encoder = encoder
        self.done = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record during the forwards inside the block, copying before kernels work in place."""
        with ExitStack() as hooks:
            hooks.callback(self.layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            for name, child in self.layer.named_children():
                before, after = self._child_hooks(name)
                hooks.callback(child.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(child.register_forward_hook(after).remove)
            hooks.callback(self.layer.register_forward_hook(self._leave).remove)
            yield

    @property
    def _off(self) -> bool:
        return self.done or not self.active()

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._off:
            self.pre = flat(stream_into(layer, args, kwargs, encoder=self.encoder))

    def _child_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._off or self.pre is None:
                return
            stream = stream_read(args, kwargs, self.pre.shape[-1])
            if stream:
                self._inputs[name] = flat(stream)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self._off:
                return
            if name in self._outputs:
                self._repeated.add(name)
            self._outputs[name] = flat((first_tensor(output),))

        return before, after

    def _leave(self, _: nn.Module, args: Any, output: Any) -> None:
        if self._off or self.pre is None:
            return
        self.post = flat(stream_out(output))
        for name in self._repeated:
            self._outputs.pop(name)
            self._inputs.pop(name, None)
        self.found = self._halves(self.pre, self.post)
        self.done = True
        self._repeated.clear()
        self._inputs.clear()
        self._outputs.clear()
