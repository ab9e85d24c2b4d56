"""Change what a model computes, at the sites that capture sees, for the forwards inside a block.

with intervening(loaded, [Edit("text", 2, "resid_pre", ReplaceRows((batch, position), values))], halves):
    loaded.model(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, SpecificationError

from .anatomy import Stack
from .attention_edits import AttentionEdits
from .edits import Add, CloseKeys, ProjectOut, ReplaceRows, Scale, ScaleScores, replace_rows
from .models import LoadedModel
from .residual import Halves, first_tensor, hidden_input, require_halves
from .tap import Tap

__all__ = [
    "Add",
    "CloseKeys",
    "Edit",
    "ProjectOut",
    "ReplaceRows",
    "Scale",
    "ScaleScores",
    "intervening",
    "replace_rows",
]

# In the order in which a layer computes them.
EDITED_SITES = (
    "resid_pre",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
)
ATTENTION_EDITS = ("q", "k", "v", "scores", "pattern", "z")

Change = Callable[[Tensor], Tensor]
Hook = Callable[..., Any]


@dataclass(frozen=True)
class Edit:
    """One tensor of one layer, and what becomes of it.

    `change` gets, and returns in the same shape: for resid_pre, resid_mid, resid_post, attn_out and mlp_out
    (batch, token, d_model); for q, k, v and z (batch, token, head, d_head), keys and values not repeated over
    query heads; for scores (before the mask) and pattern (batch, head, query, key), float32. It runs with
    autograd as the caller set it. In a vision encoder the batch is one of crops; where an encoder joins all
    of them into one sequence (Qwen), the batch is 1. Where one attends to them in pieces, a change of scores
    or weights needs a method `piece(start, tokens)`: the change of the tokens from `start` on, of all.
    """

    stack: str
    layer: int
    site: str
    change: Change


@contextmanager
def intervening(
    loaded: LoadedModel, edits: Sequence[Edit], halves: Mapping[str, Halves | None]
) -> Iterator[None]:
    """Apply edits in every forward inside the block; afterwards the model is exactly as it was.

    Edits of one tensor apply in the order given; different tensors in the order in which they are computed.

    Parameters
    ----------
    halves
        What `Proof.halves` says: the children of a layer whose outputs add up, by stack. Sites inside a layer
        need it; for the others an empty mapping will do.

    Raises
    ------
    SpecificationError    there is no such site or layer.
    ModelError            there is no such stack, or the site is not defined in this model.
    CaptureError          at the end: the tensor of an edit never came by; or a change alters the shape.
    """
    applied: set[int] = set()
    changes = [_Noted(edit, edit.change, partial(applied.add, number)) for number, edit in enumerate(edits)]
    for edit in edits:
        _check(edit, loaded, halves)
    with ExitStack() as active:
        leaving: list[tuple[nn.Module, Hook]] = []
        for number in sorted(range(len(edits)), key=lambda number: EDITED_SITES.index(edits[number].site)):
            edit = edits[number]
            if edit.site not in ATTENTION_EDITS:
                layer = loaded.anatomy.stack(edit.stack).layers[edit.layer]
                known = halves.get(edit.stack)
                own = None if known is None else known.at(edit.layer)
                inside, behind = _hooks(layer, edit.site, own, changes[number])
                for attach in inside:
                    active.callback(attach().remove)
                leaving += [(layer, hook) for hook in behind]
        # Before the library's own hooks, which keep what leaves a layer for those who read it there (LLaVA).
        # The last to be attached is the first to run.
        for layer, hook in reversed(leaving):
            active.callback(layer.register_forward_hook(hook, prepend=True).remove)
        attention = AttentionEdits()
        for edit, change in zip(edits, changes, strict=True):
            if edit.site in ATTENTION_EDITS:
                attention.add(loaded.anatomy.stack(edit.stack).layers[edit.layer], edit.site, change)
        if attention:
            active.enter_context(attention.following())
            active.callback(Tap(loaded.model, lambda call: None, attention).remove)
        yield
    left = [edits[number] for number in range(len(edits)) if number not in applied]
    if left:
        names = ", ".join(f"{edit.stack}.{edit.layer}.{edit.site}" for edit in left[:8])
        raise CaptureError(
            f"{len(left)} of {len(edits)} edits were never applied: {names} did not come by.",
            "Run the model inside the block; a layer that is skipped, or attends by code of its own, cannot "
            "be edited there.",
        )


@dataclass(frozen=True, eq=False)
class _Noted:
    """A change that says when it was made, and looks at the shape of what it makes."""

    edit: Edit
    change: Change
    note: Callable[[], None]

    def __call__(self, tensor: Tensor) -> Tensor:
        changed = self.change(tensor)
        if changed.shape != tensor.shape:
            raise CaptureError(
                f"The edit of {self.edit.stack}.{self.edit.layer}.{self.edit.site} makes "
                f"{tuple(changed.shape)} of {tuple(tensor.shape)}.",
                "A change returns a tensor of the shape that it gets.",
            )
        self.note()
        return changed

    @property
    def piece(self) -> Callable[[int, int], Change] | None:
        """What makes the change of a piece of the tokens, where the change has such a thing."""
        own = getattr(self.change, "piece", None)
        return None if own is None else lambda start, tokens: replace(self, change=own(start, tokens))


def _check(edit: Edit, loaded: LoadedModel, halves: Mapping[str, Halves | None]) -> None:
    if edit.site not in EDITED_SITES:
        raise SpecificationError(
            f"There is no site '{edit.site}' to edit.", f"The sites are {', '.join(EDITED_SITES)}."
        )
    stack: Stack = loaded.anatomy.stack(edit.stack)
    if not 0 <= edit.layer < len(stack.layers):
        raise SpecificationError(
            f"There is no layer {edit.layer} in the {edit.stack} stack: it has {len(stack.layers)}.",
            f"Choose from 0-{len(stack.layers) - 1}.",
        )
    if edit.site in ("attn_out", "resid_mid", "mlp_out"):
        require_halves(edit.stack, edit.site, halves.get(edit.stack))


def _hooks(
    layer: nn.Module, site: str, halves: Halves | None, change: Change
) -> tuple[list[Callable[[], Any]], list[Hook]]:
    """What attaches the hooks of one edit inside a layer, and its hooks of what leaves the layer."""
    if site == "resid_pre":
        return [partial(layer.register_forward_pre_hook, _entering(change), with_kwargs=True)], []
    if site == "resid_post":
        return [], [lambda _, args, output: _with_output(output, change)]
    assert halves is not None
    if halves.middle is not None:
        return _of_difference(layer, site, halves.middle, change)
    if site == "resid_mid":
        return _of_middle(layer, halves, change), []
    return _of_child(layer, halves.attention if site == "attn_out" else halves.mlp, change), []


def _entering(change: Change) -> Hook:
    return lambda _, args, kwargs: with_input(args, kwargs, _rows(change, hidden_input(args, kwargs)))


def _of_child(layer: nn.Module, child: str, change: Change) -> list[Callable[[], Any]]:
    """What a child gives is changed in the shape of what the layer was given."""
    shape: list[int] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        shape[:] = hidden_input(args, kwargs).shape

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        given = first_tensor(output)
        return _replaced(output, _rows(change, given.reshape(shape)).reshape(given.shape))

    return [
        partial(layer.register_forward_pre_hook, enter, with_kwargs=True),
        partial(layer.get_submodule(child).register_forward_hook, leave),
    ]


def _of_middle(layer: nn.Module, halves: Halves, change: Change) -> list[Callable[[], Any]]:
    """The stream between the halves is changed by what the first of them adds to it."""
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered[:] = [hidden_input(args, kwargs)]

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        before = entered.pop()

        def half(added: Tensor) -> Tensor:
            middle = before + added.reshape(before.shape)
            # A difference, so that rows which the change leaves alone stay as they were, bit for bit.
            return added + (_rows(change, middle) - middle).reshape(added.shape)

        return _replaced(output, half(first_tensor(output)))

    attention = layer.get_submodule(halves.attention)
    return [
        partial(layer.register_forward_pre_hook, enter, with_kwargs=True),
        partial(attention.register_forward_hook, leave),
    ]


def _of_difference(
    layer: nn.Module, site: str, middle: str, change: Change
) -> tuple[list[Callable[[], Any]], list[Hook]]:
    """Where halves are differences: what is changed in the middle is also added at the end of the layer."""
    entered: list[Tensor] = []
    added: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered[:] = [hidden_input(args, kwargs)]

    def between(_: nn.Module, args: Any, kwargs: Any) -> Any:
        here = hidden_input(args, kwargs)
        if site == "mlp_out":
            entered[:] = [here]
            return None
        seen = here - entered[0] if site == "attn_out" else here
        added[:] = [_rows(change, seen) - seen]
        return with_input(args, kwargs, here + added[0])

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        post = first_tensor(output)
        if site == "mlp_out":
            seen = post - entered[0]
            return _replaced(output, post + (_rows(change, seen) - seen))
        return _replaced(output, post + added.pop())

    second = layer.get_submodule(middle)
    return [
        partial(layer.register_forward_pre_hook, enter, with_kwargs=True),
        partial(second.register_forward_pre_hook, between, with_kwargs=True),
    ], [leave]


def _rows(change: Change, tensor: Tensor) -> Tensor:
    """The change of a tensor that may lack the batch axis, as those of Qwen's encoders do."""
    return change(tensor[None])[0] if tensor.ndim == 2 else change(tensor)


def with_input(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    """The arguments of a layer's call with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _with_output(output: Any, change: Change) -> Any:
    return _replaced(output, _rows(change, first_tensor(output)))


def _replaced(output: Any, tensor: Tensor) -> Any:
    """A module's output with another first tensor."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])
