"""The zarr.json of groups and arrays, straight to the file: a run has some 60 before its first sample.

It is what zarr-python would write, without the 5 ms of CPU time that it takes for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layout import compressors, layout
from .schema import ArraySchema

METADATA = "zarr.json"


@dataclass(frozen=True)
class ArrayMetadata:
    """What a writer must know of an array: `unit` is what a file holds, `chunk` what `codecs` encode."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    fill_value: Any
    unit: tuple[int, ...]
    chunk: tuple[int, ...]
    sharded: bool
    codecs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> ArrayMetadata:
        """The metadata of the array in a folder, as `create_array` wrote it."""
        told = json.loads((folder / METADATA).read_bytes())
        dtype, unit = told["data_type"], tuple(told["chunk_grid"]["configuration"]["chunk_shape"])
        sharded = told["codecs"][0]["name"] == "sharding_indexed"
        inner = told["codecs"][0]["configuration"] if sharded else told
        return cls(
            shape=tuple(told["shape"]),
            dims=tuple(told["dimension_names"]),
            dtype=dtype,
            fill_value=told["fill_value"] if dtype == "string" else np.dtype(dtype).type(told["fill_value"]),
            unit=unit,
            chunk=tuple(inner["chunk_shape"]) if sharded else unit,
            sharded=sharded,
            codecs=inner["codecs"],
        )


def create_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Write the metadata of a group."""
    _write(folder, {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def create_array(folder: Path, schema: ArraySchema, axis: str) -> None:
    """Write the metadata of an empty array, chunked and encoded as the format says."""
    plan = layout(schema, axis)
    codecs = [_bytes(schema.dtype), *(codec.to_dict() for codec in compressors(schema.dtype))]
    if plan.shard is not None:
        shard = {
            "chunk_shape": plan.chunk,
            "codecs": codecs,
            "index_codecs": [_bytes("uint64"), {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": shard}]
    fill = schema.fill_value
    metadata = {
        "shape": schema.shape(axis, 0),
        "data_type": schema.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": plan.shard or plan.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill if fill == fill else "NaN",
        "codecs": codecs,
        "attributes": dict(schema.attrs),
        "dimension_names": schema.dims,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    _write(folder, metadata)


def _bytes(dtype: str) -> dict[str, Any]:
    if dtype == "string":
        return {"name": "vlen-utf8", "configuration": {}}
    # Single bytes have no order.
    ordered = np.dtype(dtype).itemsize > 1
    return {"name": "bytes", **({"configuration": {"endian": "little"}} if ordered else {})}


def _write(folder: Path, metadata: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / METADATA).write_text(json.dumps(metadata, indent=2))
