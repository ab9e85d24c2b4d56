"""Edits of attention: of queries, keys, values, scores, weights and the heads' outputs, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import ModelError

from .attention_editor import Editor
from .residual import hidden_input

Change = Callable[[Tensor], Tensor]


@dataclass
class _Layer:
    """The changes of one layer by site, and how far a forward has come that attends in pieces."""

    changes: dict[str, list[Change]] = field(default_factory=dict)
    rows: int = 0
    seen: int = 0


class AttentionEdits(Editor):
    """The editor of an intervention; empty, it is false."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, _Layer] = {}
        self._owner: dict[nn.Module, _Layer] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    def add(self, layer: nn.Module, site: str, change: Change) -> None:
        """Another change of a site of a layer, after those that it has."""
        own = self._layers.setdefault(layer, _Layer())
        own.changes.setdefault(site, []).append(change)
        self._owner.update(dict.fromkeys(layer.modules(), own))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Count the tokens that go into each layer, for encoders that attend to them in pieces."""
        with ExitStack() as hooks:
            for layer, own in self._layers.items():
                hooks.callback(layer.register_forward_pre_hook(_counting(own), with_kwargs=True).remove)
            yield

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Changed queries, keys and values."""
        own = self._owner.get(module)
        if own is None:
            return query, key, value, mask
        query, key, value = (
            self._change(own, site, tensor.transpose(1, 2)).transpose(1, 2) if site in own.changes else tensor
            for site, tensor in (("q", query), ("k", key), ("v", value))
        )
        return query, key, value, mask

    def edits_weights(self, module: nn.Module) -> bool:
        """Whether scores or weights change here."""
        own = self._owner.get(module)
        return own is not None and bool({"scores", "pattern"} & own.changes.keys())

    def scores(self, module: nn.Module, scores: Tensor) -> Tensor:
        """Changed scores."""
        return self._change_weights(module, "scores", scores)

    def pattern(self, module: nn.Module, pattern: Tensor) -> Tensor:
        """Changed weights."""
        return self._change_weights(module, "pattern", pattern)

    def after(self, module: nn.Module, output: Tensor) -> Tensor:
        """Changed outputs of the heads."""
        own = self._owner.get(module)
        if own is None:
            return output
        if "z" in own.changes:
            output = self._change(own, "z", output)
        own.seen += output.shape[0] * output.shape[1]
        return output

    def _change_weights(self, module: nn.Module, site: str, weights: Tensor) -> Tensor:
        own = self._owner[module]
        whole = weights.shape[0] * weights.shape[2] == own.rows
        for change in own.changes.get(site, ()):
            part = change if whole else _of_piece(change, own)
            if part is None:
                raise ModelError(
                    f"{type(module).__name__} attends to its tokens in pieces, so this change of its {site} "
                    "cannot be made.",
                    "Edit q, k, v or z of this stack instead.",
                )
            weights = part(weights)
        return weights

    def _change(self, own: _Layer, site: str, tensor: Tensor) -> Tensor:
        """All changes of a tensor (batch, token, head, d_head); of a piece of it, within the whole."""
        rows = tensor.shape[0] * tensor.shape[1]
        if rows == own.rows:
            for change in own.changes[site]:
                tensor = change(tensor)
            return tensor
        piece = slice(own.seen, own.seen + rows)
        for change in own.changes[site]:
            part = _of_piece(change, own)
            if part is not None:
                tensor = part(tensor)
                continue
            whole = tensor.new_zeros(1, own.rows, *tensor.shape[2:])
            whole[0, piece] = tensor.reshape(rows, *tensor.shape[2:])
            tensor = change(whole)[0, piece].reshape(tensor.shape)
        return tensor


def _of_piece(change: Change, own: _Layer) -> Change | None:
    """The change of the tokens that come next, where it can tell."""
    piece = getattr(change, "piece", None)
    return None if piece is None else piece(own.seen, own.rows)


def _counting(own: _Layer) -> Callable[..., None]:
    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = hidden_input(args, kwargs)
        own.rows, own.seen = hidden.shape[:-1].numel(), 0

    return enter
