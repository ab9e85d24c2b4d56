"""Runs built by hand, in the documented layout and with known truths inside: what analyses are tested on.

Every run has samples of unequal length, and dask chunks that cut samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store.schema import KIND

RELATIONS = ("left", "right", "above", "below")
WORDS = ("where", "is", "the", "square", "$x$", "?")


@dataclass(frozen=True)
class Plan:
    """The shape of a synthetic run, and what is planted in it."""

    sets: int = 3
    layers: Sequence[int] = (0, 1, 2, 3)
    heads: int = 4
    kv_heads: int = 2
    d_head: int = 8
    d_model: int = 12
    grid: int = 2
    chunk: int = 7
    mask: str = "causal"
    window: int | None = None
    softcap: float | None = None
    query_tokens: str = "text"
    hub: int | None = None
    direction_layer: int | None = None
    direction_strength: float = 3.0
    dtype: str = "float32"
    seed: int = 0


def synthetic_run(plan: Plan | None = None, **changes: Any) -> xr.DataTree:
    """A run with samples, tokens/text, text/q, text/k, text/resid_post and text/resid_post_last.

    Each minimal-pair set has four samples, one for each relation. `hub` makes every query of every sample
    look at the key of that position; `direction_layer` adds to the residual of the last prompt token, in that
    layer only, a direction that says which relation the sample has.
    """
    plan = Plan(**changes) if plan is None else plan
    rng = np.random.default_rng(plan.seed)
    samples = _samples(plan, rng)
    tokens = _tokens(plan, samples.sizes["sample"], rng)
    rows = tokens.sizes["token"]
    layers = np.array(plan.layers, np.int32)
    query = rng.normal(size=(len(layers), rows, plan.heads, plan.d_head))
    key = rng.normal(size=(len(layers), rows, plan.kv_heads, plan.d_head))
    if plan.hub is not None:
        query[..., 0] += 8
        key[:, tokens["position"].values == plan.hub, :, 0] += 8
    resid = rng.normal(size=(len(layers), rows, plan.d_model))
    if plan.direction_layer is not None:
        directions = rng.normal(size=(len(RELATIONS), plan.d_model))
        owner = tokens["sample_index"].values[tokens["is_last_prompt"].values]
        which = np.array([RELATIONS.index(str(name)) for name in samples["relation"].values])[owner]
        place = list(plan.layers).index(plan.direction_layer)
        resid[place, tokens["is_last_prompt"].values] += plan.direction_strength * directions[which]
    head = {"head": np.arange(plan.heads, dtype=np.int32)}
    kv_head = {"kv_head": np.arange(plan.kv_heads, dtype=np.int32)}
    groups = {
        "/": xr.Dataset(attrs={"format": "mechanistic-run", "format_version": "0.1"}),
        "samples": samples.chunk(),
        "tokens/text": tokens.chunk(token=plan.chunk),
        "text/q": _site(plan, "q", query, ("head", "d_head"), tokens, plan.query_tokens, head, plan.chunk),
        "text/k": _site(plan, "k", key, ("kv_head", "d_head"), tokens, "all", kv_head, plan.chunk + 4),
        "text/resid_post": _site(plan, "resid_post", resid, ("d_model",), tokens, "all", {}, plan.chunk),
    }
    last = groups["text/resid_post"]["resid_post"].values[:, tokens["is_last_prompt"].values]
    groups["text/resid_post_last"] = xr.Dataset(
        {"resid_post_last": (("layer", "sample", "d_model"), last)}, {"layer": layers}
    ).chunk(layer=1, sample=5)
    return xr.DataTree.from_dict(groups)


def with_groups(run: xr.DataTree, **groups: xr.Dataset) -> xr.DataTree:
    """A run with some groups replaced; `text_q` names text/q."""
    held = {node.path: node.to_dataset(inherit=False) for node in run.subtree}
    changed = {f"/{name.replace('_', '/', 1)}": group for name, group in groups.items()}
    return xr.DataTree.from_dict(held | changed)


def _samples(plan: Plan, rng: np.random.Generator) -> xr.Dataset:
    count = 4 * plan.sets
    relation = np.array(RELATIONS * plan.sets, object)
    correct = (rng.random(count) < 0.6).astype(np.int8)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"sample-{index}" for index in range(count)], object),
        "relation": relation,
        "answer": relation,
        "group": np.repeat([f"set-{index}" for index in range(plan.sets)], 4).astype(object),
    }
    dataset = xr.Dataset({name: ("sample", values) for name, values in columns.items()})
    flags = {"flag_values": [-1, 0, 1], "flag_meanings": "unscored incorrect correct"}
    dataset["correct"] = ("sample", correct, flags)
    status = {"flag_values": [0, 1], "flag_meanings": "ok failed"}
    dataset["status"] = ("sample", np.zeros(count, np.int8), status)
    return dataset


def _tokens(plan: Plan, count: int, rng: np.random.Generator) -> xr.Dataset:
    """One start marker, the image, a question of 3 to 6 words, the last prompt token, one answer token."""
    image = plan.grid**2
    parts = []
    for sample in range(count):
        words = WORDS[-int(rng.integers(3, 7)) :]
        texts = ["<s>", *["<image>"] * image, *words, "assistant", "left"]
        names = ["special", *["image"] * image, *["text"] * len(words), "special", "answer"]
        length = len(texts)
        row, col = np.full((2, length), -1)
        row[1 : 1 + image], col[1 : 1 + image] = np.divmod(np.arange(image), plan.grid)
        side = 64 / plan.grid
        seen = row >= 0
        edges = [np.where(seen, side * place, np.nan) for place in (col, row, col + 1, row + 1)]
        columns: dict[str, Any] = {
            "sample_index": np.full(length, sample, np.int32),
            "position": np.arange(length, dtype=np.int32),
            "token_id": np.array([len(text) for text in texts], np.int32),
            "token_text": np.array(texts, object),
            "kind": np.array([KIND[name] for name in names], np.int8),
            "image_index": np.where(seen, 0, -1).astype(np.int16),
            "tile": np.where(seen, 0, -1).astype(np.int16),
            "patch_row": row.astype(np.int16),
            "patch_col": col.astype(np.int16),
            **{
                f"box_{n}": e.astype(np.float32) for n, e in zip(("x0", "y0", "x1", "y1"), edges, strict=True)
            },
            "is_subject": np.array([text == "square" for text in texts]),
            "is_object": np.zeros(length, bool),
            "is_relation": np.zeros(length, bool),
            "is_option": np.zeros(length, bool),
            "is_last_prompt": np.arange(length) == length - 2,
        }
        parts.append(xr.Dataset(coords={name: ("token", values) for name, values in columns.items()}))
    return xr.concat(parts, "token")


def _site(
    plan: Plan,
    name: str,
    values: np.ndarray[Any, Any],
    dims: tuple[str, ...],
    tokens: xr.Dataset,
    kept: str,
    coords: dict[str, Any],
    chunk: int,
) -> xr.Dataset:
    dataset = xr.Dataset(
        {name: (("layer", "token", *dims), values.astype(plan.dtype))}, {**tokens.coords, **coords}
    )
    dataset = dataset.assign_coords(layer=np.array(plan.layers, np.int32))
    if kept == "text":
        dataset = dataset.isel(token=np.flatnonzero(tokens["kind"].values != KIND["image"]))
    rule = {"mask": plan.mask, "window": plan.window, "scale": plan.d_head**-0.5, "softcap": plan.softcap}
    attrs: dict[str, Any] = {"site": name, "stack": "text", "tokens": kept, "source_dtype": plan.dtype}
    if name in ("q", "k"):
        attrs["attention"] = {str(layer): {**rule, "sinks": False} for layer in plan.layers}
    return dataset.assign_attrs(attrs).chunk({"layer": 1, "token": chunk})


def dense_attention(
    run: xr.DataTree, sample: int, layer: int, rows: Any = slice(None)
) -> np.ndarray[Any, Any]:
    """The plain causal definition in float64: softmax of q k^T / sqrt(d), (head, query, key)."""
    query, key = run["text/q"].to_dataset(inherit=False), run["text/k"].to_dataset(inherit=False)
    q = query["q"].sel(layer=layer).values[query["sample_index"].values == sample].astype(float)[rows]
    k = key["k"].sel(layer=layer).values[key["sample_index"].values == sample].astype(float)
    position = query["position"].values[query["sample_index"].values == sample][rows]
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    logits[:, np.arange(len(k))[None, :] > position[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))
