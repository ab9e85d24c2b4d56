"""A specification resolved against a model: which arrays a run gets, of what shape, dtype and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechanistic.store.errors import SpecificationError
from mechanistic.store.schema import ArraySchema, GroupSchema, token_columns

from .anatomy import CROSS, Anatomy, Stack
from .attention_statistics import statistics_arrays
from .specification import CROSS_SITES, KV_SITES, RESIDUAL_SITES, ROW_SITES, SiteSpec

UNITS = {"long_name": "activation"}
PATTERN_UNITS = {"units": "1", "long_name": "attention weight"}
FIRST_QUERY = {"long_name": "position of the first query that may read the key, -1: see mask rule"}
# The axis of a pattern: the weights of all rows, end to end.
ENTRY = "entry"
PATTERN_PLACES = {
    "start": ("int64", "first entry of the row in pattern/"),
    "length": ("int64", "number of entries of the row"),
    "key_start": ("int32", "position within the sample of the row's first key; the others follow"),
}


@dataclass(frozen=True)
class ResolvedSite:
    """One site of the run: true layer and head numbers, and the dtype it is stored in."""

    spec: SiteSpec
    stack: Stack
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    dtype: str
    source_dtype: str

    @property
    def group(self) -> str:
        """The group's path in the run."""
        return self.spec.group

    @property
    def name(self) -> str:
        """The array's name, which is the last part of its group."""
        return self.group.rpartition("/")[2]

    @property
    def axis(self) -> str:
        """The dimension that grows."""
        if self.spec.only_last:
            return "sample"
        return "patch" if self.spec.table == "xk" else self.stack.axis

    @property
    def attention(self) -> str | None:
        """The name of the attention it belongs to, such as ``text`` or ``text/x``; None outside of any."""
        if self.heads is None:
            return None
        return self.stack.name + (CROSS if self.spec.site in CROSS_SITES else "")

    @property
    def label_group(self) -> str:
        """The group that holds the labels of the site's rows."""
        return f"{self.group}_rows" if self.spec.kind == "pattern" else self.group

    @property
    def key_group(self) -> str | None:
        """The group that holds the labels of the keys, of a pattern whose keys are in no table of tokens."""
        return f"{self.group}_keys" if self.spec.site == "xpattern" else None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one layer, for a site of one array."""
        if self.heads is None:
            return (self.stack.width,)
        return (len(self.heads), self.stack.head_width)

    @property
    def arrays(self) -> tuple[ArraySchema, ...]:
        """The arrays of the site's group, (layer, row, ...), without its labels."""
        layers = len(self.layers)
        if self.spec.kind == "attn_stats":
            assert self.heads is not None
            return statistics_arrays(layers, self.axis, len(self.heads))
        if self.spec.kind == "pattern":
            assert self.heads is not None
            sizes = {"layer": layers, "head": len(self.heads)}
            return (ArraySchema(self.name, ("layer", ENTRY, "head"), self.dtype, sizes, PATTERN_UNITS),)
        names = ("d_model",) if self.heads is None else (self._head, "d_head")
        inner = dict(zip(names, self.row_shape, strict=True))
        dims = ("layer", self.axis, *inner)
        return (ArraySchema(self.name, dims, self.dtype, {"layer": layers, **inner}, UNITS),)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of a pattern: one weight of it) over all layers, uncompressed."""
        shapes = [array.shape(array.dims[1], 1) for array in self.arrays]
        items = [np.dtype(array.dtype).itemsize for array in self.arrays]
        return sum(int(np.prod(shape)) * item for shape, item in zip(shapes, items, strict=True))

    @property
    def _head(self) -> str:
        return "kv_head" if self.spec.site in KV_SITES else "head"

    def schemas(self, attrs: Mapping[str, Any]) -> tuple[GroupSchema, ...]:
        """The store's schema of the site's group, and of the group of its rows where it has one."""
        coords = {"layer": np.asarray(self.layers, np.int32)}
        if self.heads is not None:
            coords[self._head] = np.asarray(self.heads, np.int32)
        # Rows along `sample` are those of samples/, and need no labels of their own.
        labels = () if self.axis == "sample" else token_columns("patch" if self.axis == "patch" else "token")
        if self.spec.table == "xk":
            labels = _key_labels()
        described = {
            "site": self.spec.site,
            "stack": self.stack.name,
            "tokens": "+".join(self.spec.tokens),
            "source_dtype": self.source_dtype,
            **attrs,
        }
        if self.spec.kind != "pattern":
            return (GroupSchema(self.group, self.axis, (*self.arrays, *labels), described, coords),)
        places = tuple(
            ArraySchema(name, (self.axis,), dtype, attrs=self._place_attrs(name, meaning))
            for name, (dtype, meaning) in PATTERN_PLACES.items()
        )
        own = {key: described[key] for key in ("stack", "tokens")}
        groups = (
            GroupSchema(self.group, ENTRY, self.arrays, described, coords),
            GroupSchema(self.label_group, self.axis, (*places, *labels), own),
        )
        if self.key_group is None:
            return groups
        return (*groups, GroupSchema(self.key_group, "patch", _key_labels(), {"stack": self.stack.name}))

    def _place_attrs(self, name: str, meaning: str) -> dict[str, str]:
        pointer = {"points_into": self.group} if name == "start" else {}
        return {"long_name": meaning, **pointer}


def _key_labels() -> tuple[ArraySchema, ...]:
    return (*token_columns("patch"), ArraySchema("first_query", ("patch",), "int32", attrs=FIRST_QUERY))


def resolve_sites(specs: Sequence[SiteSpec], anatomy: Anatomy, dtype: str) -> tuple[ResolvedSite, ...]:
    """Every array that a specification means for this model.

    A residual site whose tokens include the last prompt token is also kept for that token alone, in a group
    of its own: it is what is read most.

    Raises
    ------
    ModelError            the model has no such stack.
    SpecificationError    the stack has no such layer or head.
    """
    asked = {spec.group for spec in specs}
    every: list[SiteSpec] = []
    for spec in specs:
        every.append(spec)
        if spec.site in RESIDUAL_SITES and spec.includes_last and not spec.only_last:
            last = replace(spec, tokens=("last",))
            every += [last] if last.group not in asked else []
    return tuple(_resolve(spec, anatomy.stack(spec.stack), dtype) for spec in every)


def attended(sites: Sequence[ResolvedSite]) -> set[str]:
    """The names of the attentions that these sites keep something of."""
    return {site.attention for site in sites if site.attention is not None}


def _resolve(spec: SiteSpec, stack: Stack, dtype: str) -> ResolvedSite:
    heads = None
    # Q-Formers stay in float32, whatever the rest of the model is loaded in.
    dtype = stack.dtype if stack.name == "qformer" and stack.dtype is not None else dtype
    if spec.site not in RESIDUAL_SITES:
        heads = spec.head_numbers(stack.kv_heads if spec.site in KV_SITES else stack.heads)
    return ResolvedSite(
        spec=spec,
        stack=stack,
        layers=_layers(spec, stack),
        heads=heads,
        # Attention rows are rebuilt in float32, whatever the model computes in.
        dtype=spec.dtype or ("float32" if spec.site in ROW_SITES else stored_dtype(dtype)),
        source_dtype=dtype,
    )


def _layers(spec: SiteSpec, stack: Stack) -> tuple[int, ...]:
    """The layers meant, of those that attend to their own tokens or to others, as the site needs it."""
    wanted = spec.layer_numbers(len(stack.layers))
    if spec.site in RESIDUAL_SITES:
        return wanted
    cross = spec.site in CROSS_SITES
    having = stack.attending(cross=cross)
    missing = sorted(set(wanted) - set(having))
    what = "cross-attention" if cross else "self-attention"
    if not having:
        raise SpecificationError(
            f"'{spec.to_string()}': no layer of {stack.name} has {what} in this model.",
            f"Ask for {stack.name}.*.{spec.kind if cross else f'x{spec.site}'}, or leave the site out.",
        )
    if missing and spec.layers.ranges is not None:
        raise SpecificationError(
            f"'{spec.to_string()}': {stack.name} has {what} in layer {', '.join(map(str, having))} only.",
            f"Ask for {stack.name}.*.{spec.site}, which takes those, or leave the site out.",
        )
    return tuple(number for number in wanted if number in having)


def stored_dtype(dtype: str) -> str:
    """The store has no bfloat16: its values are kept as float32, which holds each of them exactly."""
    return "float32" if dtype == "bfloat16" else dtype
