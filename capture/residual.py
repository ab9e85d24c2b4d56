"""The residual stream: what goes into a layer, what comes out, and what its two halves add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import ModelError

from .anatomy import Stack

# What is seen: stack name, layer number, site, and the tensor (batch, token, width).
Observer = Callable[[str, int, str, Tensor], None]

_Handle = Any


@dataclass(frozen=True)
class Halves:
    """The children of a layer whose outputs add up to what it adds: post = pre + attention + mlp."""

    attention: str
    mlp: str
    has_middle: bool

    @property
    def definition(self) -> dict[str, str]:
        """What the sites of this layer are, for the attribute `definition`."""
        return {
            "attn_out": f"output of {self.attention}",
            "mlp_out": f"output of {self.mlp}",
            "resid_mid": f"resid_pre + output of {self.attention}",
        }


@contextmanager
def residual_hooks(
    stack: Stack, wanted: Mapping[str, Sequence[int]], halves: Halves | None, observer: Observer
) -> Iterator[None]:
    """Show the wanted sites of the wanted layers to `observer` during forwards; all hooks go at exit.

    Raises
    ------
    ModelError    a site needs the layer's halves, and they are not known or have no middle.
    """
    with ExitStack() as hooks:
        for site, layers in wanted.items():
            for number in layers:
                handle = _attach(stack, number, site, halves, observer)
                hooks.callback(handle.remove)
        yield


def _attach(stack: Stack, number: int, site: str, halves: Halves | None, observer: Observer) -> _Handle:
    layer = stack.layers[number]

    def seen(tensor: Tensor) -> None:
        observer(stack.name, number, site, tensor.detach())

    if site == "resid_pre":
        return layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen(hidden_input(args, kwargs)), with_kwargs=True
        )
    if site == "resid_post":
        return layer.register_forward_hook(lambda _, args, output: seen(first_tensor(output)))
    require_halves(stack.name, site, halves)
    assert halves is not None
    if site == "resid_mid":
        return _attach_middle(layer, halves, seen)
    child = halves.attention if site == "attn_out" else halves.mlp
    return layer.get_submodule(child).register_forward_hook(
        lambda _, args, output: seen(first_tensor(output))
    )


def require_halves(stack: str, site: str, halves: Halves | None) -> None:
    """ModelError unless `site`, which is inside a layer, is defined for this stack."""
    if halves is None:
        raise ModelError(
            f"'{stack}.*.{site}' is not defined in this model: no two modules of a layer add up to it.",
            f"Ask for {stack}.*.resid_pre and {stack}.*.resid_post, whose difference is the whole layer.",
        )
    if site == "resid_mid" and not halves.has_middle:
        raise ModelError(
            f"'{stack}.*.resid_mid' does not exist in this model: its attention and MLP run side by side.",
            f"Ask for {stack}.*.attn_out and {stack}.*.mlp_out.",
        )


class _Pair:
    """Two hooks that come and go together."""

    def __init__(self, *handles: _Handle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _attach_middle(layer: nn.Module, halves: Halves, seen: Callable[[Tensor], None]) -> _Pair:
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered[:] = [hidden_input(args, kwargs)]

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        seen(entered.pop() + first_tensor(output))

    return _Pair(
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.get_submodule(halves.attention).register_forward_hook(leave),
    )


def hidden_input(args: Any, kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a layer's call."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


class LayerProbe:
    """Sees the inputs and outputs of a layer's children in one forward, and finds its halves by them.

    `pre` and `post` are what went in and out; `found` the halves and by how much they miss adding up.
    """

    def __init__(self, layer: nn.Module, tolerance: float) -> None:
        self.layer = layer
        self.tolerance = tolerance
        self.pre: Tensor | None = None
        self.post: Tensor | None = None
        self.found: tuple[Halves, float] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record during the forwards inside the block."""
        with ExitStack() as hooks:
            for name, child in self.layer.named_children():
                hooks.callback(child.register_forward_hook(self._child(name), with_kwargs=True).remove)
            hooks.callback(self.layer.register_forward_hook(self._whole, with_kwargs=True).remove)
            yield

    def _child(self, name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if args or "hidden_states" in kwargs:
                self._inputs[name] = hidden_input(args, kwargs).detach()
            self._outputs[name] = first_tensor(output).detach()

        return record

    def _whole(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.pre, self.post = hidden_input(args, kwargs).detach(), first_tensor(output).detach()
        self.found = self._halves(self.pre, self.post)
        # Kept for every layer, these would be the largest tensors of the forward.
        self._inputs.clear()
        self._outputs.clear()

    def _halves(self, pre: Tensor, post: Tensor) -> tuple[Halves, float] | None:
        """The first two children whose outputs add up to what the layer adds, and the error of that."""
        names = [name for name, value in self._outputs.items() if value.shape == pre.shape]
        for first, second in combinations(names, 2):
            middle = pre + self._outputs[first]
            error = relative_error(middle + self._outputs[second], post)
            if error <= self.tolerance:
                has_middle = any(
                    seen.shape == middle.shape and relative_error(seen, middle) <= self.tolerance
                    for seen in self._inputs.values()
                )
                return Halves(first, second, has_middle), error
        return None


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected magnitude."""
    scale = expected.float().abs().max().clamp_min(1e-30)
    return float((got.float() - expected.float()).abs().max() / scale)
