"""The sites that are made of whole attention rows: attn_stats, and pattern, the rows themselves."""

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
from .specification import ROW_SITES
from .tap import AttentionCall
from .token_table import joined, select

Array = NDArray[Any]

# Rules under which no query looks at a key behind its own place.
_NEVER_AHEAD = ("causal", "sliding_window")


class RowSite:
    """One such site of one batch: its rows, and the keys that each of them attends over.

    Tokens of the batch are counted end to end, without padding; a sequence is a sample of a decoder, a crop
    of an image of an encoder.
    """

    def __init__(self, site: ResolvedSite, batch: Batch) -> None:
        self.site = site
        table = joined(batch.table(site.spec.table))
        self.keys = Keys(table["kind"], table["position"])
        self.rows = np.flatnonzero(select(table, site.spec.tokens))
        owner = [
            table[name] for name in (site.stack.sequence if site.stack.is_encoder else ("sample_index",))
        ]
        changes = np.any([np.diff(column) != 0 for column in owner], axis=0)
        # Where each sequence begins, and the end of the last.
        self.bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(self.keys)]]).astype(np.int64)
        sequence = np.searchsorted(self.bounds, self.rows, side="right") - 1
        self.first_key = self.bounds[sequence]
        self.length = self.bounds[sequence + 1] - self.first_key
        self.start = np.cumsum(self.length) - self.length

    @property
    def entries(self) -> int:
        """Weights of all rows, for one layer and head."""
        return int(self.length.sum())

    def empty(self) -> dict[str, Array]:
        """Arrays for the values of the batch; a pattern is 0 wherever no weight is put."""
        rows = self.entries if self.site.spec.site == "pattern" else len(self.rows)
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
        """Put the values of one call into `arrays`; returns how many tokens have been seen then.

        Parameters
        ----------
        seen
            Tokens of earlier calls of the layer: an encoder may attend to its tokens in pieces.
        """
        place = self.site.layers.index(layer)
        where = f"{self.site.stack.name}.{layer}.{self.site.spec.site}"
        for sequence in range(call.query.shape[0]):
            stop = seen + call.query.shape[2]
            if not self.site.stack.is_encoder:
                seen, stop = (int(bound) for bound in self.bounds[sequence : sequence + 2])
            first, last = np.searchsorted(self.rows, [seen, stop])
            if first < last:
                view = {name: values[place] for name, values in arrays.items()}
                self._put(view, call, sequence, rule, slice(first, last), seen, stop, where)
            seen = stop
        return seen

    def _put(
        self,
        view: Mapping[str, Array],
        call: AttentionCall,
        sequence: int,
        rule: MaskRule,
        rows: slice,
        first: int,
        stop: int,
        where: str,
    ) -> None:
        assert self.site.heads is not None
        heads = list(self.site.heads)
        queries = torch.from_numpy(self.rows[rows] - first)
        keys = Keys(self.keys.kind[first:stop], self.keys.position[first:stop])
        ahead = rule.mask not in _NEVER_AHEAD
        if self.site.spec.site == "attn_stats":
            computed = row_statistics(call, sequence, queries, keys, ahead=ahead)
            require_finite(computed, where)
            for name, values in computed.items():
                view[name][rows] = values[:, heads]
            return
        length = int(self.length[rows.start])
        offset = first - int(self.first_key[rows.start])
        entry = int(self.start[rows.start])
        entries = slice(entry, entry + len(queries) * length)
        table = view["pattern"][entries].reshape(len(queries), length, len(heads))
        dtype = getattr(torch, self.site.dtype)
        for block in row_blocks(call, sequence, queries, len(keys), ahead=ahead):
            weights = block.weights[heads].permute(1, 2, 0)
            if not bool(torch.isfinite(weights).all()):
                raise CaptureError(
                    f"{where}: its attention is not finite.",
                    "The model overflows: load it with dtype=float32 or bfloat16, or leave that sample out.",
                )
            table[block.rows, offset : offset + weights.shape[1]] = weights.to(dtype).cpu().numpy()


class RowSites:
    """All such sites of one batch, filled call by call."""

    def __init__(self, sites: Sequence[ResolvedSite], batch: Batch) -> None:
        self.sites = [RowSite(site, batch) for site in sites if site.spec.site in ROW_SITES]
        self.arrays = {each.site.group: each.empty() for each in self.sites}
        self._seen: dict[tuple[str, int], int] = {}

    def take(self, stack: str, layer: int, call: AttentionCall, rule: MaskRule) -> None:
        """Compute what is wanted of one call."""
        for each in self.sites:
            if each.site.stack.name != stack or layer not in each.site.layers or not len(each.rows):
                continue
            key = (each.site.group, layer)
            arrays = self.arrays[each.site.group]
            self._seen[key] = each.compute(arrays, call, rule, layer, self._seen.get(key, 0))

    def finish(self) -> dict[str, dict[str, Array]]:
        """The arrays by group, and where the rows of a pattern lie. CaptureError if a layer was not seen."""
        for each in self.sites:
            for layer in each.site.layers:
                if len(each.rows) and self._seen.get((each.site.group, layer), 0) != len(each.keys):
                    raise CaptureError(
                        f"{each.site.group}: layer {layer} was not seen, or only in part, in the forward.",
                        "The model skips layers or attends by code of its own; leave this site out.",
                    )
        places = {
            f"{each.site.group}_rows": each.labels() for each in self.sites if each.site.name == "pattern"
        }
        return self.arrays | places
