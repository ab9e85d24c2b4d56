"""Rows of attention weights, put in the place of others, or kept as they come by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .edits import replace_rows


@dataclass(frozen=True, eq=False)
class ReplacePattern:
    """Put other rows into attention weights; the keys that these do not reach get nothing.

    Parameters
    ----------
    rows
        (row,): which queries, counted end to end over the batch, with its padding.
    first
        (row,): the key, counted likewise, that the first of the row's values belongs to.
    values
        (row, head, key), or (row, key) where one head is replaced.
    heads
        (row,): that head.
    start
        The first token of the encoder that is there.
    """

    rows: Tensor
    first: Tensor
    values: Tensor
    heads: Tensor | None = None
    start: int = 0

    def piece(self, start: int, tokens: int) -> ReplacePattern:
        """The change of the rows of some tokens, where an encoder attends to them in pieces."""
        return replace(self, start=start)

    def __call__(self, weights: Tensor) -> Tensor:
        crops, _, size, keys = weights.shape
        own = self.rows - self.start
        here = (own >= 0) & (own < crops * size)
        crop, query = own[here] // size, own[here] % size
        held = self.values[here].to(weights.device)
        # Where the keys of the crop are among those of the row.
        place = (self.start + crop * size - self.first[here])[:, None] + torch.arange(keys)
        known = (place >= 0) & (place < held.shape[-1])
        shape = (len(held), *[1] * (held.ndim - 2), keys)
        index = place.clamp(0, held.shape[-1] - 1).reshape(shape).expand(*held.shape[:-1], keys)
        new = held.gather(-1, index.to(held.device)) * known.reshape(shape).to(held.device)
        where = (crop, query) if self.heads is None else (crop, query, self.heads[here])
        return replace_rows(weights.transpose(1, 2), where, new).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Kept:
    """Changes nothing, and gives `keep` what it saw of one sample, on the host.

    Tokens are counted end to end over crops: (token, ...); of a pattern (query, head, key). Where an encoder
    attends in pieces, it gives what there is so far after each of them.
    """

    site: str
    keep: Callable[[Tensor], None]
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.piece(0, tensor.shape[0] * tensor.shape[2 if self.site == "pattern" else 1])(tensor)

    def piece(self, start: int, tokens: int) -> Callable[[Tensor], Tensor]:
        """What keeps the piece that begins at a token."""

        def see(tensor: Tensor) -> Tensor:
            crops = tensor.detach().cpu()
            if self.site == "pattern":
                crops = crops.transpose(1, 2)
            size = crops.shape[1]
            if start == 0:
                last = tokens if self.site == "pattern" else crops.shape[-1]
                self.seen[:] = [crops.new_zeros(tokens, *crops.shape[2:-1], last)]
            (whole,) = self.seen
            for number, crop in enumerate(crops):
                own = slice(start + number * size, start + (number + 1) * size)
                if self.site == "pattern":
                    whole[own, :, own] = crop
                else:
                    whole[own] = crop
            self.keep(whole)
            return tensor

        return see


def padded_keys(values: Sequence[Tensor]) -> Tensor:
    """Rows (row, ..., key) of samples of different lengths in one tensor, 0 behind the shorter ones."""
    width = max(each.shape[-1] for each in values)
    return torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in values])
