"""What the workers of an engine wrote of one batch, put back together: rows by sample, heads over ranks."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from mmap import ACCESS_COPY, mmap
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError

from .residual import relative_error
from .sites import ResolvedSite
from .specification import KV_SITES, RESIDUAL_SITES
from .vllm_folders import Lent
from .vllm_heads import owned_heads
from .vllm_plan import tensor_name
from .vllm_recorder import LOGITS, LOGITS_ROWS, numbers_file
from .vllm_rows import Places, place_rows


class Spool:
    """The files of one batch, read where they lie; a context, since files are open while it is.

    Parameters
    ----------
    tolerance
        By how much of its largest value a token that was computed twice may differ from itself.
    """

    def __init__(self, lent: Lent, ranks: int, tolerance: float) -> None:
        self.tolerance = tolerance
        self._lent = lent
        self._stems = [lent.path / f"rank{rank}" for rank in range(ranks)]
        self._small: list[dict[str, Tensor]] = []
        self._held: list[dict[str, Any]] = []
        self._mapped: dict[tuple[int, str], Tensor] = {}
        self._places: dict[tuple[str, bytes], Places] = {}

    def __enter__(self) -> Spool:
        from safetensors import safe_open

        for stem in self._stems:
            with safe_open(stem.with_suffix(".safetensors"), "pt") as file:
                self._small.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                self._held.append(json.loads(file.metadata()["held"]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The numbers stay, to be written over when nothing maps them any more.
        for stem in self._stems:
            stem.with_suffix(".safetensors").unlink()

    def rows(
        self,
        name: str,
        layer: int,
        selection: str,
        wanted: Sequence[NDArray[np.int64]],
        heads: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The wanted positions of every sample in one tensor, end to end: (row, ...), of all its `heads`.

        Parameters
        ----------
        out
            Where to put them, if they come from one process and are of its dtype: a copy less.

        Raises
        ------
        CaptureError    a position is missing, or was computed twice with different results.
        """
        where = tensor_name(name, layer)
        places = self._place(selection, wanted, where)
        index = torch.from_numpy(places.rows)
        if heads is None or len(self._stems) == 1:
            whole = self._layer(0, name, layer)
            self._check_again(whole, places, where)
            if out is not None and out.dtype == whole.dtype and out.shape[1:] == whole.shape[1:]:
                return torch.index_select(whole, 0, index, out=out)
            rows = whole.index_select(0, index)
            return rows if heads is None else join_heads([rows], heads)
        parts = []
        for rank in range(len(self._stems)):
            part = self._layer(rank, name, layer)
            self._check_again(part, places, where)
            parts.append(part.index_select(0, index))
        return join_heads(parts, heads)

    def whole(
        self, name: str, layers: Sequence[int], selection: str, wanted: Sequence[NDArray[np.int64]]
    ) -> Tensor | None:
        """All of a tensor as it lies in the file, (layer, row, ...), if that is what is wanted of it."""
        if len(self._stems) > 1 or list(layers) != self._held[0].get(name, {}).get("layers"):
            return None
        places, mapped = self._place(selection, wanted, name), self._map(0, name)
        in_order = np.array_equal(places.rows, np.arange(mapped.shape[1]))
        return mapped if in_order and not len(places.again) else None

    def sinks(self, layer: int, heads: int) -> Tensor | None:
        """The attention sinks of a layer."""
        name = f"sinks.{layer}"
        if name not in self._small[0]:
            return None
        parts = [small[name][None] for small in self._small]
        return join_heads(parts, heads)[0]

    def logits(self, samples: int) -> NDArray[np.float32]:
        """Logits (sample, vocabulary) at the last prompt token."""
        held = self._small[0]
        if LOGITS not in held:
            raise CaptureError("The engine gave no logits.", "Report the vLLM version and the model.")
        rows, values = held[LOGITS_ROWS].tolist(), held[LOGITS].numpy()
        if sorted(rows) != list(range(samples)):
            raise CaptureError(
                f"The engine gave logits of samples {sorted(rows)} of a batch of {samples}.",
                "Report the vLLM version and the model.",
            )
        ordered: NDArray[np.float32] = values[np.argsort(rows)]
        return ordered

    def _layer(self, rank: int, name: str, layer: int) -> Tensor:
        held = self._held[rank].get(name)
        if held is None or layer not in held["layers"]:
            raise CaptureError(
                f"{tensor_name(name, layer)} was not seen by the engine.",
                "Report the vLLM version and the model.",
            )
        return self._map(rank, name)[held["layers"].index(layer)]

    def _map(self, rank: int, name: str) -> Tensor:
        if (rank, name) not in self._mapped:
            held = self._held[rank][name]
            count, dtype = int(np.prod(held["shape"])), getattr(torch, held["dtype"])
            # Nothing cannot be mapped.
            flat = self._numbers(rank, name, count, dtype) if count else torch.empty(0, dtype=dtype)
            self._mapped[rank, name] = flat.reshape(held["shape"])
        return self._mapped[rank, name]

    def _numbers(self, rank: int, name: str, count: int, dtype: torch.dtype) -> Tensor:
        with numbers_file(self._stems[rank], name).open("rb") as file:
            mapped = mmap(file.fileno(), count * dtype.itemsize, access=ACCESS_COPY)
        # Every tensor and array of these numbers refers to the map, and it to the folder.
        weakref.finalize(mapped, lambda lent: None, self._lent).atexit = False
        return torch.frombuffer(mapped, dtype=dtype, count=count)

    def _place(self, selection: str, wanted: Sequence[NDArray[np.int64]], where: str) -> Places:
        key = (selection, b"|".join(each.tobytes() for each in wanted))
        if key not in self._places:
            labels = [small[f"rows.{selection}"].numpy() for small in self._small]
            if any(not np.array_equal(each, labels[0]) for each in labels[1:]):
                raise CaptureError(
                    "The processes of the engine kept different tokens.", "Report the vLLM version."
                )
            self._places[key] = place_rows(labels[0], wanted, where)
        return self._places[key]

    def _check_again(self, rows: Tensor, places: Places, where: str) -> None:
        if not len(places.again):
            return
        first, last = torch.from_numpy(places.again).T
        error = relative_error(rows[last], rows[first])
        if error > self.tolerance:
            raise CaptureError(
                f"{where}: a token that the engine computed twice differs by {error:.2g} (allowed: "
                f"{self.tolerance:.0e}).",
                "Give the engine more memory for keys and values, so that it does not begin requests again.",
            )


def join_heads(parts: Sequence[Tensor], heads: int) -> Tensor:
    """All `heads` of a tensor (row, head, ...) of which rank r holds ``owned_heads(heads, r, ranks)``.

    Raises
    ------
    CaptureError    a rank holds another number of heads.
    """
    owner: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        owned = owned_heads(heads, rank, len(parts))
        if part.shape[1] != len(owned):
            raise CaptureError(
                f"Process {rank} of {len(parts)} holds {part.shape[1]} heads, not {len(owned)} of {heads}.",
                "The engine splits its heads in another way; use tensor_parallel_size=1.",
            )
        for place, head in enumerate(owned):
            owner.setdefault(head, part[:, place])
    return parts[0] if len(parts) == 1 else torch.stack([owner[head] for head in range(heads)], dim=1)


def heads_of(site: ResolvedSite, name: str) -> int | None:
    """How many heads a tensor of this name has in a site's stack; None for the residual stream."""
    if name in RESIDUAL_SITES:
        return None
    return site.stack.kv_heads if name in KV_SITES else site.stack.heads


def is_stored_as(rows: Tensor, site: ResolvedSite) -> bool:
    """Whether a site keeps these rows in the dtype that they have, which is the model's."""
    return {rows.dtype} == {getattr(torch, site.dtype), getattr(torch, site.source_dtype)}
