"""The residual stream: what goes into a layer, what comes out, and what its two halves add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mechanistic.store.errors import ModelError

from .anatomy import Stack

# What is seen: stack name, layer number, site, and the tensor (batch, token, width).
Observer = Callable[[str, int, str, Tensor], None]

_Handle = Any


@dataclass(frozen=True)
class Halves:
    """The children of a layer whose outputs add up to what it adds: post = pre + attention + mlp.

    Where the layer scales those outputs before it adds them, `middle` is the child that reads the residual
    stream between the two halves, and each half is a difference. Where layers of a stack differ in kind,
    `each` has those of every layer, and the rest is that of the first.
    """

    attention: str
    mlp: str
    has_middle: bool
    middle: str | None = None
    each: tuple[Halves, ...] = ()

    @classmethod
    def of_layers(cls, found: Sequence[Halves]) -> Halves:
        """Those of a stack: one for all layers, or where layers differ, `each`."""
        if len(set(found)) == 1:
            return found[0]
        return replace(found[0], has_middle=all(one.has_middle for one in found), each=tuple(found))

    def at(self, layer: int) -> Halves:
        """Those of one layer."""
        return self.each[layer] if self.each else self

    @property
    def definition(self) -> dict[str, str]:
        """What the sites inside a layer are, for the attribute `definition`."""
        if self.each:
            return self.define(range(len(self.each)))
        if self.middle is not None:
            return {
                "attn_out": f"resid_mid - resid_pre, which is output of {self.attention} scaled",
                "mlp_out": f"resid_post - resid_mid, which is output of {self.mlp} scaled",
                "resid_mid": f"input of {self.middle}",
            }
        return {
            "attn_out": f"output of {self.attention}",
            "mlp_out": f"output of {self.mlp}",
            "resid_mid": f"resid_pre + output of {self.attention}",
        }

    def define(self, layers: Sequence[int]) -> dict[str, str]:
        """`definition` for some layers; where they differ, with the numbers of those that it is true of."""
        told: dict[str, dict[str, list[str]]] = {}
        for number in layers:
            for site, what in self.at(number).definition.items():
                told.setdefault(site, {}).setdefault(what, []).append(str(number))
        return {
            site: next(iter(numbers))
            if len(numbers) == 1
            else "; ".join(f"layer {', '.join(of)}: {what}" for what, of in numbers.items())
            for site, numbers in told.items()
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


def _attach(stack: Stack, number: int, site: str, every: Halves | None, observer: Observer) -> _Handle:
    layer = stack.layers[number]

    def seen(tensor: Tensor) -> None:
        observer(stack.name, number, site, tensor.detach())

    if site == "resid_pre":
        return layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen(hidden_input(args, kwargs)), with_kwargs=True
        )
    if site == "resid_post":
        return layer.register_forward_hook(lambda _, args, output: seen(first_tensor(output)))
    require_halves(stack.name, site, every)
    assert every is not None
    halves = every.at(number)
    if halves.middle is not None:
        return _attach_difference(layer, site, halves.middle, seen)
    if site == "resid_mid":
        return _attach_middle(layer, halves, seen)
    return _attach_child(layer, halves.attention if site == "attn_out" else halves.mlp, seen)


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


class _Handles:
    """Hooks that come and go together."""

    def __init__(self, *handles: _Handle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _attach_child(layer: nn.Module, child: str, seen: Callable[[Tensor], None]) -> _Handles:
    """What a child gives, in the shape of what the layer was given."""
    shape: list[int] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        shape[:] = hidden_input(args, kwargs).shape

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        seen(first_tensor(output).reshape(shape))

    return _Handles(
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.get_submodule(child).register_forward_hook(leave),
    )


def _attach_middle(layer: nn.Module, halves: Halves, seen: Callable[[Tensor], None]) -> _Handles:
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered[:] = [hidden_input(args, kwargs)]

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        before = entered.pop()
        seen(before + first_tensor(output).reshape(before.shape))

    return _Handles(
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.get_submodule(halves.attention).register_forward_hook(leave),
    )


def _attach_difference(layer: nn.Module, site: str, middle: str, seen: Callable[[Tensor], None]) -> _Handles:
    """The two halves of a layer, as differences from the residual stream between them."""
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered[:] = [hidden_input(args, kwargs)]

    def between(_: nn.Module, args: Any, kwargs: Any) -> None:
        here = hidden_input(args, kwargs)
        if site == "mlp_out":
            entered[:] = [here]
        else:
            seen(here - entered[0] if site == "attn_out" else here)

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        if site == "mlp_out":
            seen(first_tensor(output) - entered[0])

    return _Handles(
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.get_submodule(middle).register_forward_pre_hook(between, with_kwargs=True),
        layer.register_forward_hook(leave),
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
        self._repeated: set[str] = set()

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
            # One that a layer calls twice, such as dropout, would be seen twice in a capture.
            if name in self._outputs:
                self._repeated.add(name)
            self._outputs[name] = first_tensor(output).detach()

        return record

    def _whole(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.pre, self.post = hidden_input(args, kwargs).detach(), first_tensor(output).detach()
        for name in self._repeated:
            self._outputs.pop(name)
            self._inputs.pop(name, None)
        self._outputs = _shaped(self._outputs, self.pre)
        self.found = self._halves(self.pre, self.post)
        # Kept for every layer, these would be the largest tensors of the forward.
        self._repeated.clear()
        self._inputs.clear()
        self._outputs.clear()

    def _halves(self, pre: Tensor, post: Tensor) -> tuple[Halves, float] | None:
        """The first two children whose outputs add up to what the layer adds, and the error of that."""
        for first, second in combinations(self._outputs, 2):
            middle = pre + self._outputs[first]
            error = relative_error(middle + self._outputs[second], post)
            if error <= self.tolerance:
                read = _shaped(self._inputs, middle).values()
                has_middle = any(relative_error(seen, middle) <= self.tolerance for seen in read)
                return Halves(first, second, has_middle), error
        return self._scaled_halves(pre, post)

    def _scaled_halves(self, pre: Tensor, post: Tensor) -> tuple[Halves, float] | None:
        """Two children whose outputs, scaled by channel, lead to some child's input and on to `post`."""
        for reader, middle in self._inputs.items():
            if middle.shape != pre.shape or torch.equal(middle, pre):
                continue
            first = self._scaled(middle - pre)
            second = self._scaled(post - middle)
            if first is not None and second is not None and first[0] != second[0]:
                return Halves(first[0], second[0], True, reader), max(first[1], second[1])
        return None

    def _scaled(self, step: Tensor) -> tuple[str, float] | None:
        """The first child whose output is `step` but for a factor for each channel, and the error of that."""
        for name, value in self._outputs.items():
            flat, wanted = value.float().flatten(0, -2), step.float().flatten(0, -2)
            # Mllama adds nothing at words before the first image, whatever the module gives there.
            added = wanted.abs().amax(1) > 0
            if bool(added.any()):
                flat, wanted = flat[added], wanted[added]
            factor = (flat * wanted).sum(0) / (flat * flat).sum(0).clamp_min(1e-30)
            error = relative_error(flat * factor, wanted)
            if error <= self.tolerance:
                return name, error
        return None


def _shaped(seen: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Of these tensors, those with the shape of `like`; OPT's MLPs get the tokens of a batch end to end."""
    shapes = (like.shape, like.flatten(0, -2).shape)
    return {name: value.reshape(like.shape) for name, value in seen.items() if value.shape in shapes}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected magnitude."""
    scale = expected.float().abs().max().clamp_min(1e-30)
    return float((got.float() - expected.float()).abs().max() / scale)
