"""The two hops from the last token over text tokens to the image, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .allowed_keys import allowed_keys
from .attention_inputs import attention_inputs
from .attention_rows import AttentionRows, walk_rows
from .blocks import MAX_BYTES, Columns, align_blocks, map_blocks, sample_spans
from .mask_rules import AttentionRule, mask_columns
from .token_selection import token_axis, token_mask

FirstHop = Literal["same", "earlier"]

_ATTRS = {
    "weight_from_source": {"units": "1", "long_name": "attention weight of the source on this token"},
    "mass_on_target": {"units": "1", "long_name": "attention mass of this token on the target"},
}


def text_hops(
    run: xr.DataTree,
    *,
    via: str = "text",
    source: str = "last",
    target: str = "image",
    stack: str = "text",
    layer: int | Sequence[int] | None = None,
    sample: int | Sequence[int] | None = None,
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """Both hops of every text token: a_t = A[source, t], and m_t = sum over target keys i of A[t, i]; lazy.

    Parameters
    ----------
    via, source, target
        Token selections, see `select_tokens`; a sample has one source.
    stack, layer, sample, max_bytes
        Which rows: see `attention_statistics`.

    Returns
    -------
    weight_from_source, mass_on_target (layer, token, head), float32, share of the row.
        For the tokens of `via` and the source. mass_on_target is NaN where the token may look at no target.
    Coordinates: the labels of the tokens; is_source; is_via: a token of `via` that stands before the source.

    Raises
    ------
    MissingSiteError    the run lacks q or k.
    DataError           a sample has no source or several, or q holds no token of `via`; see also
                        `attention_statistics`.
    SpecificationError  a selection that does not parse.
    """
    hops, labels = stacked_hops(
        run,
        via=via,
        source=source,
        target=target,
        stack=stack,
        layer=layer,
        sample=sample,
        max_bytes=max_bytes,
    )
    dims = ("layer", token_axis(labels), "head")
    variables = {name: (dims, hops[:, :, place], attrs) for place, (name, attrs) in enumerate(_ATTRS.items())}
    return labels.assign(variables)


def stacked_hops(
    run: xr.DataTree,
    *,
    via: str,
    source: str,
    target: str,
    stack: str,
    layer: int | Sequence[int] | None,
    sample: int | Sequence[int] | None,
    max_bytes: int,
) -> tuple[Any, xr.Dataset]:
    """Both hops as one dask array (layer, token, hop, head), and its tokens' labels; see `text_hops`."""
    inputs = attention_inputs(run, stack=stack, tokens=f"{via}+{source}", layer=layer, sample=sample)
    query, key = inputs.query, inputs.key
    axis = token_axis(query)
    query = query.assign_coords(_ends(query, axis, via, source))
    key = key.assign_coords(is_target=(token_axis(key), token_mask(key, target)))
    blocks = align_blocks(query[inputs.query_name], key[inputs.key_name], max_bytes=max_bytes)
    kernel = partial(_hops_of_samples, rules=inputs.rules, kv_of_head=inputs.kv_of_head)
    hops = map_blocks(
        kernel,
        blocks,
        query_columns=(*mask_columns(query), "is_source"),
        key_columns=(*mask_columns(key), "is_target"),
        shape=(len(_ATTRS), query.sizes["head"]),
    )
    dims = {"layer", axis, "head"}
    coords = {name: coord for name, coord in query.coords.items() if set(coord.dims) <= dims}
    attrs = {"stack": stack, "via": via, "source": source, "target": target, "computed_from": "q and k"}
    return hops, xr.Dataset({}, coords, attrs).chunk({axis: hops.chunks[1]})


def _ends(query: xr.Dataset, axis: str, via: str, source: str) -> dict[str, Any]:
    """The columns is_source and is_via."""
    owner, position = (np.asarray(query[name].values) for name in ("sample_index", "position"))
    is_source = token_mask(query, source)
    counts = np.bincount(owner, is_source, minlength=int(owner.max(initial=-1)) + 1).astype(int)
    if (counts[owner] != 1).any():
        wrong = owner[counts[owner] != 1][0]
        raise DataError(
            f"sample {wrong} has {counts[wrong]} tokens that are {source}; a path starts at one.",
            "Choose a token that every sample has once, such as source='last', or samples with sample=[...].",
        )
    place = np.zeros(len(counts), np.int64)
    place[owner[is_source]] = position[is_source]
    is_via = token_mask(query, via) & (position < place[owner])
    if not is_via.any():
        raise DataError(
            f"none of the queries held here that stand before {source} is {via}: nothing to pass through.",
            f"Capture their queries: --sites '{query.attrs.get('stack', 'text')}.*.q[text]'.",
        )
    return {"is_source": (axis, is_source), "is_via": (axis, is_via)}


def _hops_of_samples(
    layer: int,
    query: NDArray[Any],
    key: NDArray[Any],
    query_columns: Columns,
    key_columns: Columns,
    *,
    rules: Mapping[int, AttentionRule],
    kv_of_head: NDArray[np.int64],
) -> NDArray[np.float32]:
    """(row, hop, head) for one layer of one block."""
    result = np.zeros((query.shape[0], len(_ATTRS), query.shape[1]), np.float32)
    from_source = result[:, 0]
    owner, position = query_columns["sample_index"], query_columns["position"]
    walk = walk_rows(layer, query, key, query_columns, key_columns, rules[layer], kv_of_head)
    for piece, rows in walk:
        result[piece, 1, rows.heads] = _mass_on_target(rows).T
        for place in np.flatnonzero(rows.query["is_source"]):
            weights = rows.exponentials[:, place] / rows.totals[:, place, None]
            # Keys beyond those held here come after everything that the source may look at.
            seen = (owner == rows.query["sample_index"][place]) & (position < weights.shape[-1])
            from_source[np.ix_(np.flatnonzero(seen), rows.heads)] = weights[:, position[seen]].T
    return result


def _mass_on_target(rows: AttentionRows) -> NDArray[np.float32]:
    """(head, query); NaN where a query may look at no target."""
    target = rows.key["is_target"]
    mass = (rows.exponentials @ target.astype(np.float32)) / rows.totals
    blind = ~(allowed_keys(rows) & target).any(axis=-1)
    return np.where(blind, np.float32(np.nan), mass)


def map_hops(
    kernel: Callable[..., NDArray[Any]],
    hops: Any,
    labels: xr.Dataset,
    first_hop: str,
    shape: tuple[int, ...],
    *columns: NDArray[Any],
    per: Literal["sample", "block"],
) -> Any:
    """The dask array (layer, sample or block, head, *shape) that `kernel` makes of blocks of whole samples.

    kernel(weight, mass, first, sample_index, position, is_source, is_via, *columns) gets weight_from_source
    and mass_on_target (layer, token, head), m_t (layer, token), and columns (token). Attention is rebuilt in
    the same task, and let go of: what is kept does not grow with the tokens.
    """
    if first_hop not in ("same", "earlier"):
        raise SpecificationError(
            f"There is no first hop {first_hop!r}.", "Take it from the 'same' layer or from 'earlier' ones."
        )
    chunks = (hops.chunks[1],)
    counts: tuple[int, ...] = (1,) * len(chunks[0])
    if per == "sample":
        start = sample_spans(np.asarray(labels["sample_index"].values)).start
        edges = np.searchsorted(start, np.concatenate([[0], np.cumsum(chunks[0])]))
        counts = tuple(np.diff(edges).tolist())
    arguments: list[Any] = [hops, (0, 1, 9, 2)]
    arguments += [None, None] if first_hop == "same" else [_mean_below(hops[:, :, 1]), (0, 1)]
    for name in ("sample_index", "position", "is_source", "is_via"):
        arguments += [da.asarray(labels[name].data).rechunk(chunks), (1,)]
    for values in columns:
        arguments += [da.from_array(values, chunks=chunks), (1,)]
    extra = tuple(range(3, 3 + len(shape)))
    return da.blockwise(
        partial(_call_kernel, kernel=kernel),
        (0, 1, 2, *extra),
        *arguments,
        new_axes=dict(zip(extra, shape, strict=True)),
        adjust_chunks={1: counts},
        concatenate=True,
        align_arrays=False,
        dtype=np.float32,
        meta=np.empty((0,) * (3 + len(shape)), np.float32),
    )


def _call_kernel(
    hops: NDArray[np.float32],
    first: NDArray[np.float32] | None,
    *columns: NDArray[Any],
    kernel: Callable[..., NDArray[Any]],
) -> NDArray[Any]:
    weight, mass = hops[:, :, 0], hops[:, :, 1]
    return kernel(weight, mass, mass.mean(axis=-1) if first is None else first, *columns)


def _mean_below(mass: Any) -> Any:
    """m_t (layer, token): the mean over heads, averaged over the layers below."""
    mean = mass.mean(axis=-1)
    seen = da.cumsum((~da.isnan(mean)).astype(np.int32), axis=0)
    total = da.cumsum(da.nan_to_num(mean), axis=0)
    below = np.arange(1, mean.shape[0] + 1, dtype=np.float32)[:, None]
    averaged = da.where(seen > 0, total / below, np.nan)
    lowest = da.full_like(mean[:1], np.nan)
    return da.concatenate([lowest, averaged[:-1]]).rechunk(mean.chunks).astype(np.float32)
