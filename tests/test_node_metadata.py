"""The zarr.json that is written by hand is the one that zarr-python writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from mechanistic.store import ArraySchema
from mechanistic.store.layout import compressors, layout
from mechanistic.store.node_metadata import ArrayMetadata, create_array, create_group
from mechanistic.store.schema import DTYPES

ATTRS = {"units": "pixel", "flag_values": [0, 1], "text": "ä"}
LAYERED = {"dims": ("layer", "token", "d"), "sizes": {"layer": 5, "d": 6}}
TABLE = {"dims": ("token", "option"), "sizes": {"option": 0}}
COLUMN = {"dims": ("token",)}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    # Words have no layers.
    [
        (dtype, shape)
        for dtype in DTYPES
        for shape in (TABLE, COLUMN, LAYERED)[: 2 if dtype == "string" else 3]
    ],
)
def test_node_metadata__is_what_zarr_python_writes(tmp_path: Path, dtype: str, shape: dict) -> None:
    schema = ArraySchema("x", dtype=dtype, attrs=ATTRS, **shape)
    create_group(tmp_path / "ours", ATTRS)
    create_array(tmp_path / "ours" / "x", schema, "token")
    plan = layout(schema, "token")
    zarr.create_group(str(tmp_path / "theirs"), zarr_format=3, attributes=ATTRS).create_array(
        "x",
        shape=schema.shape("token", 0),
        chunks=plan.chunk,
        shards=plan.shard,
        dtype="str" if dtype == "string" else dtype,
        compressors=compressors(dtype),
        fill_value=schema.fill_value,
        dimension_names=list(schema.dims),
        attributes=ATTRS,
    )
    for name in ("zarr.json", "x/zarr.json"):
        ours, theirs = (json.loads((tmp_path / each / name).read_text()) for each in ("ours", "theirs"))
        assert ours == theirs
    told = ArrayMetadata.read(tmp_path / "theirs" / "x")
    array = zarr.open_array(str(tmp_path / "ours" / "x"), mode="r")
    assert (told.shape, told.dims, told.chunk) == (array.shape, schema.dims, array.chunks)
    assert (told.unit, told.sharded) == (array.shards or array.chunks, array.shards is not None)
    np.testing.assert_array_equal(told.fill_value, array.fill_value)
    assert told.dtype == dtype
