"""The sites that are made of whole attention rows: attn_stats, and pattern, the rows themselves.

xattn_stats and xpattern are the same of cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError

from .attention_rows import row_blocks
from .attention_statistics import Keys, require_finite, row_statistics
from .batch import Batch
from .mask_rules import MaskRule
from .sites import ResolvedSite
from .specification import CROSS_SITES, ROW_SITES
from .tap import AttentionCall
from .token_table import Columns, joined, select

Array = NDArray[Any]

# Rules under which no query looks at a key behind its own place.
_NEVER_AHEAD = ("causal", "sliding_window")


class RowSite:
    """One such site of one batch: its rows, and the keys that each of them attends over.

    Tokens of the batch are counted end to end, without padding, queries and, of cross-attention, keys; a
    sequence is a sample of a decoder, a crop of an image of an encoder.
    """

    def __init__(self, site: ResolvedSite, batch: Batch) -> None:
        self.site = site
        queries = joined(batch.table(site.spec.table))
        keys = joined(batch.table("xk")) if site.spec.site in CROSS_SITES else queries
        self.keys = Keys(keys["kind"], keys["position"])
        self.rows = np.flatnonzero(select(queries, site.spec.tokens))
        owner = site.stack.sequence if site.stack.is_encoder else ("sample_index",)
        self.query_bounds, self.key_bounds = (sequence_bounds(each, owner) for each in (queries, keys))
        sequence = np.searchsorted(self.query_bounds, self.rows, side="right") - 1
        self.first_key = self.key_bounds[sequence]
        self.length = self.key_bounds[sequence + 1] - self.first_key
        self.start = np.cumsum(self.length) - self.length

    @property
    def entries(self) -> int:
        """Weights of all rows, for one layer and head."""
        return int(self.length.sum())

    def empty(self) -> dict[str, Array]:
        """Arrays for the values of the batch; a pattern is 0 wherever no weight is put."""
        rows = self.entries if self.site.spec.kind == "pattern" else len(self.rows)
        return {
            array.name: np.zeros(array.shape(array.dims[1], rows), array.dtype) for array in self.site.arrays
        }

    def labels(self) -> dict[str, Array]:
        """The columns of pattern_rows/ that say where the weights of a row are; `start` within the batch."""
        key_start = self.keys.position[self.first_key].astype(np.int32)
        return {"start": self.start, "length": self.length, "key_start": key_start}

    def compute(
        self, arrays: Mapping[str, Array], call: AttentionCall, rule: MaskRule, layer: int, seen: int
    ) -> int:
        """Put the values of one call into `arrays`; returns how many queries have been seen then.

        Parameters
        ----------
        seen
            Queries of earlier calls of the layer: an encoder may attend to its tokens in pieces.
        """
        place = self.site.layers.index(layer)
        where = f"{self.site.stack.name}.{layer}.{self.site.spec.site}"
        for sequence in range(call.query.shape[0]):
            stop = seen + call.query.shape[2]
            keys = slice(seen, stop)
            if not self.site.stack.is_encoder:
                seen, stop = (int(bound) for bound in self.query_bounds[sequence : sequence + 2])
                keys = slice(*(int(bound) for bound in self.key_bounds[sequence : sequence + 2]))
            first, last = np.searchsorted(self.rows, [seen, stop])
            if first < last:
                view = {name: values[place] for name, values in arrays.items()}
                rows = slice(int(first), int(last))
                self._put(view, call, sequence, rule, rows, self.rows[rows] - seen, keys, where)
            seen = stop
        return seen

    def _put(
        self,
        view: Mapping[str, Array],
        call: AttentionCall,
        sequence: int,
        rule: MaskRule,
        rows: slice,
        places: Array,
        keys: slice,
        where: str,
    ) -> None:
        assert self.site.heads is not None
        heads = list(self.site.heads)
        queries = torch.from_numpy(places)
        of_keys = Keys(self.keys.kind[keys], self.keys.position[keys])
        ahead = rule.mask not in _NEVER_AHEAD
        if self.site.spec.kind == "attn_stats":
            computed = row_statistics(call, sequence, queries, of_keys, ahead=ahead)
            require_finite(computed, where)
            for name, values in computed.items():
                view[name][rows] = values[:, heads]
            return
        length = int(self.length[rows.start])
        offset = keys.start - int(self.first_key[rows.start])
        entry = int(self.start[rows.start])
        entries = slice(entry, entry + len(queries) * length)
        table = view[self.site.name][entries].reshape(len(queries), length, len(heads))
        dtype = getattr(torch, self.site.dtype)
        for block in row_blocks(call, sequence, queries, len(of_keys), ahead=ahead):
            weights = block.weights[heads].permute(1, 2, 0)
            if not bool(torch.isfinite(weights).all()):
                raise CaptureError(
                    f"{where}: its attention is not finite.",
                    "The model overflows: load it with dtype=float32 or bfloat16, or leave that sample out.",
                )
            table[block.rows, offset : offset + weights.shape[1]] = weights.to(dtype).cpu().numpy()


def sequence_bounds(columns: Columns, owner: Sequence[str]) -> NDArray[np.int64]:
    """Where each sequence of tokens that stand end to end begins, and the end of the last."""
    changes = np.any([np.diff(columns[name]) != 0 for name in owner], axis=0)
    inner = np.flatnonzero(changes) + 1
    return np.concatenate([[0], inner, [len(columns[owner[0]])]]).astype(np.int64)


class RowSites:
    """All such sites of one batch, filled call by call."""

    def __init__(self, sites: Sequence[ResolvedSite], batch: Batch) -> None:
        self.sites = [RowSite(site, batch) for site in sites if site.spec.site in ROW_SITES]
        self.arrays = {each.site.group: each.empty() for each in self.sites}
        self._seen: dict[tuple[str, int], int] = {}

    def take(self, attention: str, layer: int, call: AttentionCall, rule: MaskRule) -> None:
        """Compute what is wanted of one call of an attention, such as ``text`` or ``text/x``."""
        for each in self.sites:
            if each.site.attention != attention or layer not in each.site.layers or not len(each.rows):
                continue
            key = (each.site.group, layer)
            arrays = self.arrays[each.site.group]
            self._seen[key] = each.compute(arrays, call, rule, layer, self._seen.get(key, 0))

    def finish(self) -> dict[str, dict[str, Array]]:
        """The arrays by group, and where the rows of a pattern lie. CaptureError if a layer was not seen."""
        for each in self.sites:
            for layer in each.site.layers:
                if len(each.rows) and self._seen.get((each.site.group, layer), 0) != each.query_bounds[-1]:
                    raise CaptureError(
                        f"{each.site.group}: layer {layer} was not seen, or only in part, in the forward.",
                        "The model skips layers or attends by code of its own; leave this site out.",
                    )
        places = {
            each.site.label_group: each.labels() for each in self.sites if each.site.spec.kind == "pattern"
        }
        return self.arrays | places
