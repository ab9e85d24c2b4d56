"""Names of layers as people write them: a module's path, the end of one, or ``layer.5`` of the decoder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mechanistic.store.errors import SpecificationError

from .anatomy import is_attention, layer_lists

_SHORT = re.compile(r"layers?\.(\d+)")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that attend, by path: those named attention that hold no other such module."""
    found = {path: module for path, module in model.named_modules() if is_attention(module)}
    return {
        path: module
        for path, module in found.items()
        if not any(other.startswith(f"{path}.") for other in found)
    }


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of every stack of the model, by path."""
    return {
        f"{path}.{number}": layer
        for path, layers in layer_lists(model).items()
        for number, layer in enumerate(layers)
    }


def resolve_attention(model: nn.Module, name: str) -> str:
    """The path of the one attention module that `name` means.

    Raises
    ------
    SpecificationError    it means none, or several; the message lists those that exist.
    """
    every = attention_modules(model)
    wanted = _short(model, name) or name
    return _one(name, _within(wanted, every), every, model, "attention module")


def resolve_module(model: nn.Module, name: str) -> str:
    """The path of the one module, of whatever kind, that `name` means. Raises like `resolve_attention`."""
    every = dict(model.named_modules())
    short = _short(model, name)
    if short is not None or name in every:
        return short or name
    return _one(
        name, [path for path in every if path.endswith(f".{name}")], layer_modules(model), model, "module"
    )


def _within(name: str, every: Mapping[str, nn.Module]) -> list[str]:
    inside = [path for path in every if f"{path}.".startswith(f"{name}.")]
    return inside or [path for path in every if f".{name}." in f".{path}."]


def _one(name: str, found: list[str], every: Iterable[str], model: nn.Module, kind: str) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecificationError(
            f"'{name}' could be {len(found)} modules of {type(model).__name__}: {_listed(found)}.",
            "Write one of them.",
        )
    raise SpecificationError(
        f"{type(model).__name__} has no {kind} '{name}'.",
        f"There are: {_listed(every)}; layer.0, layer.1, ... are those of its decoder or only stack.",
    )


def _listed(paths: Iterable[str]) -> str:
    """All paths, with the numbers of layers that differ in nothing else as ranges."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)?", path)
        head, number, tail = (match[1], int(match[2]), match[3] or "") if match else (path, -1, "")
        numbers.setdefault((head, tail), []).append(number)
    parts = []
    for (head, tail), held in numbers.items():
        several = f"{{{min(held)}-{max(held)}}}" if len(held) > 1 else str(held[0])
        parts.append(f"{head}{several}{tail}" if held[0] >= 0 else head)
    return ", ".join(parts) or "none"


def _short(model: nn.Module, name: str) -> str | None:
    """The path of layer N of the decoder, or of the only stack, if that is what `name` says."""
    match = _SHORT.fullmatch(name)
    if match is None:
        return None
    lists = layer_lists(model)
    if len(lists) != 1:
        anything: Any = model
        decoder = anything.get_decoder() if hasattr(model, "get_decoder") else None
        inside = set(decoder.modules()) if decoder is not None and decoder is not model else set()
        lists = {path: layers for path, layers in lists.items() if layers in inside}
    if len(lists) != 1:
        raise SpecificationError(
            f"'{name}' does not say which stack of {type(model).__name__} it belongs to.",
            f"Write a whole path. There are: {_listed(layer_modules(model))}.",
        )
    path, layers = next(iter(lists.items()))
    if int(match[1]) >= len(layers):
        raise SpecificationError(
            f"There is no '{name}': {path} of {type(model).__name__} has {len(layers)} layers.",
            f"There are: layer.0 to layer.{len(layers) - 1}, counted from 0.",
        )
    return f"{path}.{int(match[1])}"
