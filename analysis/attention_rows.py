"""Exact attention rows rebuilt from q and k, a few at a time, and statistics of each row.

Never holds more of a pattern than `ROW_BLOCK` queries of the heads that share a key head. For causal layers
only the keys up to the last of those queries are multiplied at all, which halves the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError

from .attention_inputs import AttentionInputs, attention_inputs
from .blocks import MAX_BYTES, ROW_BLOCK, Columns, align_blocks, map_blocks, sample_spans
from .mask_rules import AttentionRule, mask_columns
from .single_precision import to_single
from .stored_statistics import only_statistics, stored_statistics

Floats = NDArray[np.float32]

# Finite, so that 0 * MASKED is 0 and not NaN in sum p log p; exp of it is exactly 0.
MASKED = np.float32(-1e30)

# Scores and their exponentials are read several times: they should stay in a core's own cache.
TILE_BYTES = 1 << 20

# While a row's sum lies between these, the softmax of its logits as they are is as exact as of logits shifted
# by their maximum, which costs two more passes over them; farther out, entropy would lose digits first.
_LEAST, _MOST = np.float32(1e-7), np.float32(1e7)


@dataclass(frozen=True)
class AttentionRows:
    """A few rows of one layer of one sample: `scores` are logits, or MASKED; a row's may share a shift.

    scores, exponentials (head, query, key); sums (head, query) of the exponentials, and totals, what they are
    divided by: the sums and, in a layer with attention sinks, the sink's own. Both are NaN where a query may
    look at no key; sums also where a sink takes all. `query` and `key` hold the columns of these query rows
    and of these keys. `heads` are positions on the head axis. Those that come next take the same memory.
    """

    scores: Floats
    exponentials: Floats
    sums: Floats
    totals: Floats
    query: Columns
    key: Columns
    heads: NDArray[np.int64]

    @cached_property
    def weights(self) -> Floats:
        """The attention weights (head, query, key); each row sums to 1, with a sink to less."""
        return np.asarray(self.exponentials / self.totals[..., None])


@dataclass(frozen=True)
class RowStatistic:
    """Numbers computed from attention rows: `kernel` maps AttentionRows to (head, query, len(variables))."""

    variables: Mapping[str, Mapping[str, Any]]
    kernel: Callable[[AttentionRows], NDArray[Any]]
    query_columns: tuple[str, ...] = ()
    key_columns: tuple[str, ...] = ()


def attention_statistics(
    run: xr.DataTree,
    statistics: Sequence[RowStatistic],
    *,
    stack: str = "text",
    cross: bool = False,
    tokens: str | None = None,
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Compute several statistics of every attention row in one walk over q and k; lazy.

    Of a run that has attn_stats and not both of q and k, those that were stored.

    Parameters
    ----------
    cross
        Rows of the stack's cross-attention, from xq and xk, or else xattn_stats.
    tokens
        Query rows to keep, such as ``"last"`` (see `select_tokens`); keys are always complete.
    layer, sample
        True layer numbers and rows of samples/; None means all.

    Returns
    -------
    one variable (layer, token, head), float32, for each name in `statistics`, with the labels of the query
    rows; NaN where a query may look at no key at all.

    Raises
    ------
    MissingSiteError    the run lacks q or k, and its attn_stats do not hold just these statistics.
    SpecificationError, FormatError, DataError
        see `attention_inputs` and `align_blocks`; also when computed, naming sample and layer, if q or k are
        not finite there.
    """
    if only_statistics(run, stack, cross=cross):
        wanted = {name: attrs for statistic in statistics for name, attrs in statistic.variables.items()}
        chosen: dict[str, Any] = {"tokens": tokens, "layer": layer, "sample": sample}
        return stored_statistics(run, wanted, stack=stack, cross=cross, **chosen)
    inputs = attention_inputs(run, stack=stack, cross=cross, tokens=tokens, layer=layer, sample=sample)
    blocks = align_blocks(inputs.query[inputs.query_name], inputs.key[inputs.key_name], max_bytes=max_bytes)
    names = [name for statistic in statistics for name in statistic.variables]
    kernel = partial(
        _statistics_kernel, rules=inputs.rules, kv_of_head=inputs.kv_of_head, statistics=tuple(statistics)
    )
    stacked = map_blocks(
        kernel,
        blocks,
        query_columns=(*mask_columns(inputs.query), *(c for s in statistics for c in s.query_columns)),
        key_columns=(*mask_columns(inputs.key), *(c for s in statistics for c in s.key_columns)),
        shape=(inputs.query.sizes["head"], len(names)),
    )
    return _labelled(stacked, inputs, statistics, names)


def _labelled(
    stacked: Any, inputs: AttentionInputs, statistics: Sequence[RowStatistic], names: list[str]
) -> xr.Dataset:
    axis = str(inputs.query["sample_index"].dims[0])
    attrs = {name: dict(s.variables[name]) for s in statistics for name in s.variables}
    coords = {
        name: coord
        for name, coord in inputs.query.coords.items()
        if set(coord.dims) <= {"layer", axis, "head"}
    }
    provenance = {key: inputs.query.attrs[key] for key in ("stack", "tokens") if key in inputs.query.attrs}
    variables = {
        name: (("layer", axis, "head"), stacked[..., place], attrs[name]) for place, name in enumerate(names)
    }
    computed_from = f"{inputs.query_name} and {inputs.key_name}"
    dataset = xr.Dataset(variables, coords, {**provenance, "computed_from": computed_from})
    # Labels are cut like the results, so that the Dataset has one chunking.
    return dataset.chunk({axis: stacked.chunks[1]})


def _statistics_kernel(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Columns,
    key_columns: Columns,
    *,
    rules: Mapping[int, AttentionRule],
    kv_of_head: NDArray[np.int64],
    statistics: tuple[RowStatistic, ...],
) -> Floats:
    """(row, head, statistic) for one layer of one block."""
    width = sum(len(statistic.variables) for statistic in statistics)
    result = np.empty((query.shape[0], query.shape[1], width), np.float32)
    for rows, part in walk_rows(layer, query, key, query_columns, key_columns, rules[layer], kv_of_head):
        computed = np.concatenate([statistic.kernel(part) for statistic in statistics], axis=-1)
        result[rows.start : rows.stop, part.heads] = computed.transpose(1, 0, 2)
    return result


def walk_rows(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Columns,
    key_columns: Columns,
    rule: AttentionRule,
    kv_of_head: NDArray[np.int64],
) -> Iterator[tuple[slice, AttentionRows]]:
    """Rebuild the attention rows of one layer of some samples: (which query rows, their AttentionRows)."""
    rows, keys = sample_spans(query_columns["sample_index"]), sample_spans(key_columns["sample_index"])
    place = np.searchsorted(keys.sample, rows.sample)
    groups = [(kv, np.flatnonzero(kv_of_head == kv)) for kv in np.unique(kv_of_head)]
    # Used again and again: memory that is new to a process costs as much as a pass over it.
    longest = int((keys.stop - keys.start).max(initial=0))
    scratch = np.empty((2, max(TILE_BYTES // 4, ROW_BLOCK * longest)), np.float32)
    for number, at in enumerate(place):
        sample = int(rows.sample[number])
        these, those = slice(rows.start[number], rows.stop[number]), slice(keys.start[at], keys.stop[at])
        of_key = {name: values[those] for name, values in key_columns.items()}
        _require_complete(of_key["position"], sample)
        # (kv_head, d_head, key): the layout that the matrix product reads in order; the scale goes here, as
        # several query heads share a key head.
        keys_of_sample = to_single(np.ascontiguousarray(key[those].transpose(1, 2, 0)))
        keys_of_sample = keys_of_sample * np.float32(rule.scale)
        # A logit of minus infinity would pass for a weight of 0.
        if not np.isfinite(keys_of_sample).all():
            raise _not_finite(sample, layer)
        for start in range(these.start, these.stop, ROW_BLOCK):
            piece = slice(start, min(start + ROW_BLOCK, these.stop))
            of_query = {name: values[piece] for name, values in query_columns.items()}
            stop = rule.key_stop(of_query, of_key)
            near = {name: values[:stop] for name, values in of_key.items()}
            banned = ~rule.allowed(of_query, of_key)[:, :stop]
            edge, blind = banned[:, _first_banned(banned) :], np.all(banned, axis=1)
            asked = to_single(query[piece].transpose(1, 0, 2))
            for kv, heads in groups:
                for part in _tiles(heads, *banned.shape):
                    scores = _scores(
                        asked[part], keys_of_sample[kv, :, :stop], rule.softcap, edge, scratch[0]
                    )
                    sinks = None if rule.sinks is None else rule.sinks[part]
                    softmax = _softmax(scores, sinks, blind, scratch[1], sample, layer)
                    yield piece, AttentionRows(scores, *softmax, of_query, near, part)


def _tiles(heads: NDArray[np.int64], rows: int, keys: int) -> list[NDArray[np.int64]]:
    """The heads that share a key head, as many at a time as have scores of TILE_BYTES."""
    most = max(1, TILE_BYTES // (4 * rows * max(1, keys)))
    return [heads[first : first + most] for first in range(0, len(heads), most)]


def _first_banned(banned: NDArray[np.bool_]) -> int:
    """The first key that some query may not look at."""
    return int(banned.any(axis=0).argmax()) if banned.any() else banned.shape[1]


def _scores(
    query: Floats, key: Floats, softcap: float | None, edge: NDArray[np.bool_], scratch: Floats
) -> Floats:
    """Logits (head, query, key) of heads that share a key head, as one matrix product; MASKED in the edge.

    `edge` (query, last keys) is True where a query may not look.
    """
    heads, rows, width = query.shape
    scores: Floats = scratch[: heads * rows * key.shape[1]].reshape(heads * rows, key.shape[1])
    # What is not finite is found by its totals, and reported with its sample: no warning besides.
    with np.errstate(invalid="ignore", over="ignore"):
        np.matmul(query.reshape(heads * rows, width), key, out=scores)
        if softcap is not None:
            np.tanh(np.divide(scores, np.float32(softcap), out=scores), out=scores)
            scores *= np.float32(softcap)
    scores = scores.reshape(heads, rows, key.shape[1])
    np.copyto(scores[..., key.shape[1] - edge.shape[1] :], MASKED, where=edge)
    return scores


def _softmax(
    scores: Floats, sinks: Floats | None, blind: NDArray[np.bool_], scratch: Floats, sample: int, layer: int
) -> tuple[Floats, Floats, Floats]:
    """Exponentials, sums and totals of rows; their scores are shifted in place where float32 needs it."""
    sinks = None if sinks is None else sinks[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        exponentials, sums, totals = _exponentials(scores, sinks, scratch)
        if not ((totals > _LEAST) & (totals < _MOST) | blind).all():
            # Masked scores stay far below any logit, also in a row of nothing else.
            highest = scores.max(axis=-1, initial=MASKED / 2)
            if sinks is not None:
                highest = np.maximum(highest, sinks)
                sinks = sinks - highest
            scores -= highest[..., None]
            exponentials, sums, totals = _exponentials(scores, sinks, scratch)
            if not ((totals > 0) & np.isfinite(totals) | blind).all():
                raise _not_finite(sample, layer)
    if sinks is not None:
        # A sink that takes all leaves nothing to divide among the keys.
        sums = np.where(sums > 0, sums, np.float32(np.nan))
    if blind.any():
        sums[:, blind] = totals[:, blind] = np.nan
    return exponentials, sums, totals


def _exponentials(scores: Floats, sinks: Floats | None, scratch: Floats) -> tuple[Floats, Floats, Floats]:
    exponentials = np.exp(scores, out=scratch[: scores.size].reshape(scores.shape))
    sums: Floats = exponentials @ np.ones(scores.shape[-1], np.float32)
    return exponentials, sums, sums if sinks is None else sums + np.exp(sinks)


def _not_finite(sample: int, layer: int) -> DataError:
    return DataError(
        f"q or k of sample {sample} is not finite in layer {layer}.",
        "Capture that sample again, or leave it out (sample=...); `mechanistic verify` checks the bytes.",
    )


def _require_complete(position: NDArray[Any], sample: int) -> None:
    if not np.array_equal(position, np.arange(len(position))):
        raise DataError(
            f"the keys of sample {sample} are not complete: positions other than 0 to {len(position) - 1}.",
            "Attention over some of the keys is not the model's: capture k[all], select query rows only.",
        )
