"""A specification resolved against a model: which arrays a run gets, of what shape, dtype and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechanistic.store.schema import ArraySchema, GroupSchema, token_columns

from .anatomy import Anatomy, Stack
from .specification import KV_SITES, RESIDUAL_SITES, SiteSpec

UNITS = {"long_name": "activation"}


@dataclass(frozen=True)
class ResolvedSite:
    """One array of the run: true layer and head numbers, and the dtype it is stored in."""

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
        return "sample" if self.spec.only_last else self.stack.axis

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one layer."""
        if self.heads is None:
            return (self.stack.width,)
        return (len(self.heads), self.stack.head_width)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all layers, uncompressed."""
        return int(np.prod(self.row_shape)) * len(self.layers) * np.dtype(self.dtype).itemsize

    def schema(self, attrs: Mapping[str, Any]) -> GroupSchema:
        """The store's schema of this group."""
        inner = {"d_model": self.stack.width}
        coords = {"layer": np.asarray(self.layers, np.int32)}
        if self.heads is not None:
            head = "kv_head" if self.spec.site in KV_SITES else "head"
            inner = {head: len(self.heads), "d_head": self.stack.head_width}
            coords[head] = np.asarray(self.heads, np.int32)
        dims = ("layer", self.axis, *inner)
        array = ArraySchema(self.name, dims, self.dtype, {"layer": len(self.layers), **inner}, UNITS)
        # Rows along `sample` are those of samples/, and need no labels of their own.
        labels = () if self.axis == "sample" else token_columns("patch" if self.axis == "patch" else "token")
        described = {
            "site": self.spec.site,
            "stack": self.stack.name,
            "tokens": "+".join(self.spec.tokens),
            "source_dtype": self.source_dtype,
            **attrs,
        }
        return GroupSchema(self.group, self.axis, (array, *labels), described, coords)


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


def _resolve(spec: SiteSpec, stack: Stack, dtype: str) -> ResolvedSite:
    heads = None
    if spec.site not in RESIDUAL_SITES:
        heads = spec.head_numbers(stack.kv_heads if spec.site in KV_SITES else stack.heads)
    return ResolvedSite(
        spec=spec,
        stack=stack,
        layers=spec.layer_numbers(len(stack.layers)),
        heads=heads,
        dtype=spec.dtype or stored_dtype(dtype),
        source_dtype=dtype,
    )


def stored_dtype(dtype: str) -> str:
    """The store has no bfloat16: its values are kept as float32, which holds each of them exactly."""
    return "float32" if dtype == "bfloat16" else dtype
