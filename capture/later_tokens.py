"""A decoder's forward of only the tokens that a change can reach.

Where no token before a place reads one from there on, a change from there on leaves the earlier tokens as
they were: their keys and values are those of the sample as it is, and need not be computed again. Each layer
then gets the later tokens alone. Where they begin is read off the masks that the model used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import CaptureError

from .attention_editor import Editor
from .interventions import with_input
from .models import LoadedModel
from .prompts import Inputs
from .residual import first_tensor, hidden_input
from .resumed_forward import ResumedForward, check_error, joined_inputs, plain_logits, replaced_forward
from .tap import AttentionCall, Tap, tapped


@dataclass(frozen=True)
class EarlierTokens:
    """Of one sample as it is: keys and values (kv_head, token, d_head) of each attention module, and `cuts`,
    the positions from which on no earlier token reads."""

    keys: Mapping[nn.Module, tuple[Tensor, Tensor]]
    cuts: NDArray[np.int64]

    def reached(self, position: int) -> int:
        """The first token that a change at this position may reach."""
        return int(self.cuts[np.searchsorted(self.cuts, position, "right") - 1])


def earlier_tokens(loaded: LoadedModel, forward: Callable[[], object]) -> EarlierTokens:
    """What `forward`, of one sample, shows of its tokens.

    Raises
    ------
    CaptureError    a layer attends to its own tokens more than once.
    """
    own = loaded.anatomy.stack("text").module_layers(cross=False)
    keys: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    cuts: dict[int, NDArray[np.int64]] = {}
    masks = []

    def see(call: AttentionCall) -> None:
        if call.module not in own:
            return
        if call.module in keys:
            raise CaptureError(
                f"{type(call.module).__name__} attends more than once in a forward.",
                "Its earlier tokens cannot be left out.",
            )
        keys[call.module] = (call.key[0].clone(), call.value[0].clone())
        # Layers share their masks, and kept ones keep their ids.
        masks.append(call.mask)
        if call.mask is None or id(call.mask) not in cuts:
            cuts[id(call.mask)] = _cuts(call.allowed()[0])

    with torch.no_grad(), tapped(loaded.model, see):
        forward()
    if not keys:
        raise CaptureError("No attention of the decoder came by.", "It attends by code of its own.")
    common = list(cuts.values())
    for each in common[1:]:
        common[0] = np.intersect1d(common[0], each)
    return EarlierTokens(keys, common[0])


def _cuts(allowed: Tensor) -> NDArray[np.int64]:
    """Positions before which no query of (head, query, key) reads a key from there on."""
    place = torch.arange(allowed.shape[-1], device=allowed.device)
    reach = (allowed.any(0) * place).amax(-1).cummax(0).values
    later = (place[1:][reach[:-1] < place[1:]]).cpu().numpy()
    return np.concatenate([[0], later])


@contextmanager
def later_tokens(
    loaded: LoadedModel, layer: int, begins: Sequence[int], last: Tensor, earlier: Sequence[EarlierTokens]
) -> Iterator[None]:
    """From this layer on, forwards inside the block compute of each sample the tokens from `begins` on.

    Hidden states of the others stay what they were at the layer; those of the later ones are exact where
    `begins` are cuts of the samples, and no earlier token was changed.

    Parameters
    ----------
    last
        The position of each sample's last token; the batch is padded on the right.
    earlier
        What is known of each sample; the same object for copies of one.
    """
    stack = loaded.anatomy.stack("text")
    last = last.to(loaded.model.device)[:, None]
    first = torch.tensor(begins, device=last.device)[:, None]
    steps = torch.arange(int((last - first).max()) + 1, device=last.device)
    # A shorter sample computes its last token more than once, to the same end.
    rows = torch.minimum(first + steps, last)
    with ExitStack() as active:
        active.callback(Tap(loaded.model, lambda call: None, _WholeKeys(rows, earlier)).remove)
        for module in stack.layers[layer:]:
            active.enter_context(replaced_forward(module, _Narrow(module.forward, rows)))
        yield


class _Narrow:
    """A layer that gets some of its tokens only."""

    def __init__(self, forward: Callable[..., Any], rows: Tensor) -> None:
        self.forward = forward
        self.rows = rows
        self.names = list(inspect.signature(forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        width = hidden.shape[1]
        kwargs = {name: self._argument(name, value, width) for name, value in kwargs.items()}
        others = zip(self.names[1:], args[1:], strict=False)
        args = (*args[:1], *(self._argument(*each, width) for each in others))
        args, kwargs = with_input(args, kwargs, _taken(hidden, self.rows))
        output = self.forward(*args, **kwargs)
        part = first_tensor(output)
        whole = _put(hidden, self.rows, part)
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    def _argument(self, name: str, value: Any, width: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._argument(name, each, width) for each in value)
        # Masks are left to the attention that reads them.
        if not isinstance(value, Tensor) or name == "hidden_states" or "mask" in name:
            return value
        if name == "position_embeddings" and value.shape[-2] == width:
            return _taken(value, self.rows)
        if name == "position_ids" and value.shape[-1] == width:
            return _taken(value[..., None], self.rows)[..., 0]
        if width in value.shape:
            raise CaptureError(
                f"What a layer is given as {name}, of {tuple(value.shape)}, may be of its tokens.",
                "Its earlier tokens cannot be left out.",
            )
        return value


class _WholeKeys(Editor):
    """Gives the later tokens' queries the keys of all tokens."""

    def __init__(self, rows: Tensor, earlier: Sequence[EarlierTokens]) -> None:
        self.rows = rows
        self.several = list({id(each): each for each in earlier}.values())
        places = {id(each): place for place, each in enumerate(self.several)}
        self.owner = torch.tensor([places[id(each)] for each in earlier], device=rows.device)

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Known keys and values, and those of the later tokens; and the mask's rows of these."""
        # Layers below, and edited ones, see every token.
        if query.shape[2] != self.rows.shape[1] or module not in self.several[0].keys:
            return query, key, value, mask
        if mask is None:
            raise CaptureError(
                f"{type(module).__name__} attends without a mask.", "Its earlier tokens cannot be left out."
            )
        width = mask.shape[-1]
        key, value = (self._whole(module, place, new, width) for place, new in enumerate((key, value)))
        if mask.shape[2] == width:
            mask = _taken(mask.transpose(0, 1), self.rows).transpose(0, 1)
        return query, key, value, mask

    def _whole(self, module: nn.Module, place: int, new: Tensor, width: int) -> Tensor:
        known = [each.keys[module][place] for each in self.several]
        padded = [nn.functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in known]
        whole = (
            torch.stack(padded, 1)[:, self.owner]
            if len(padded) > 1
            else padded[0][:, None].expand(-1, len(new), -1, -1)
        )
        return _put(whole, self.rows, new.transpose(0, 1)).transpose(0, 1)


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows (sample, row) of a tensor (..., sample or 1, token, width)."""
    return tensor[..., _owner(rows) if tensor.shape[-3] > 1 else 0, rows, :]


def _put(tensor: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """A tensor (..., sample, token, width) with other rows (..., sample, row, width)."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor[..., _owner(rows), rows, :] = new
    return tensor


def _owner(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)[:, None]


def prove_later_tokens(resumed: ResumedForward, sample: Inputs) -> float:
    """By how much logits of later tokens alone miss those of a forward of all tokens, other states given to
    these, as a share of the largest.

    Raises
    ------
    CaptureError    by more than the dtype explains; or why later tokens cannot be computed alone.
    """
    loaded = resumed.loaded
    inputs, last = joined_inputs(loaded, [sample])
    entered: list[Tensor] = []
    first = loaded.anatomy.stack("text").layers[0]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(hidden_input(args, kwargs)), with_kwargs=True
    )
    try:
        known = earlier_tokens(loaded, lambda: plain_logits(loaded, inputs, last))
    finally:
        handle.remove()
    if len(known.cuts) == 1:
        raise CaptureError("Every token reads the last one.", "All of them are computed again.")
    begins = known.cuts[np.unique([1, len(known.cuts) // 2, len(known.cuts) - 1])].tolist()
    inputs, last = joined_inputs(loaded, [sample] * len(begins))
    hidden = entered[0].repeat(len(begins), 1, 1)
    for row, begin in enumerate(begins):
        hidden[row, begin:] = entered[0][0].roll(1, 0)[begin:]
    with torch.no_grad():
        whole = resumed.logits(inputs, last, 0, hidden)
        try:
            with later_tokens(loaded, 0, begins, last, [known] * len(begins)):
                part = resumed.logits(inputs, last, 0, hidden)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as cause:
            raise CaptureError(
                f"{loaded.name}: a layer does not take some of its tokens alone ({cause}).",
                "All of them are computed again.",
            ) from cause
    error = float((part - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
    check_error(error, loaded.dtype, f"{loaded.name}: a forward of later tokens alone")
    return error


def find_later_tokens(resumed: ResumedForward, sample: Inputs) -> float | None:
    """What `prove_later_tokens` finds; None where every token has to be computed."""
    try:
        return prove_later_tokens(resumed, sample)
    except CaptureError:
        return None
