"""What a run may hold: groups, arrays, dimensions, units. FORMAT.md says the same in prose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FORMAT = "mechanistic-run"
FORMAT_VERSION = "0.1"

DTYPES = ("float16", "float32", "int8", "int16", "int32", "int64", "uint8", "bool", "string")

KIND = {"text": 0, "image": 1, "special": 2, "answer": 3}
CORRECT = {"unscored": -1, "incorrect": 0, "correct": 1}
STATUS = {"ok": 0, "failed": 1}
ROLES = ("subject", "object", "relation", "option", "last_prompt")

MASKS = (
    "causal",
    "bidirectional",
    "prefix",
    "causal_image_blocks",
    "sliding_window",
    "sliding_window_image_blocks",
    "image_windows",
    "per_image",
    "padded_image",
    "cross",
    "cross_from",
)

# `points_into` names the group whose rows the values are: where rows are put behind others, they move along.
_SAMPLE = {"long_name": "row in samples/", "points_into": "samples"}
_START = {"long_name": "first row in image_bytes/, -1: not stored", "points_into": "image_bytes"}


@dataclass(frozen=True)
class ArraySchema:
    """One array: `dims` in order, the fixed ones with their `sizes`, the growing one without.

    `beside` is how many arrays of its size its group has: a writer buffers a shard of each, so that they
    share the size that one array's shard would have.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    beside: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TypeError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def fill_value(self) -> Any:
        """NaN, -1, False or '': what was never written cannot pass for data."""
        if self.dtype.startswith("float"):
            return float("nan")
        if self.dtype == "string":
            return ""
        return False if self.dtype == "bool" else 0 if self.dtype == "uint8" else -1

    def shape(self, axis: str, rows: int) -> tuple[int, ...]:
        return tuple(rows if dim == axis else self.sizes[dim] for dim in self.dims)


@dataclass(frozen=True)
class GroupSchema:
    """One group: arrays that grow together along `axis`, and fixed coordinates such as layer numbers."""

    path: str
    axis: str
    arrays: tuple[ArraySchema, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    coords: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in self.arrays:
            if self.axis not in array.dims:
                raise ValueError(
                    f"{self.path}/{array.name} does not have the growing dimension {self.axis!r}"
                )


def enumeration(name: str, dims: tuple[str, ...], meanings: Mapping[str, int]) -> ArraySchema:
    """An int8 array whose values mean something: CF flag_values / flag_meanings."""
    attrs = {"flag_values": list(meanings.values()), "flag_meanings": " ".join(meanings)}
    return ArraySchema(name, dims, "int8", attrs=attrs)


def token_columns(axis: Literal["token", "patch"]) -> tuple[ArraySchema, ...]:
    """The coordinates every token axis carries; decoder tokens also have ids, text and roles."""
    pixels = {"units": "pixel", "long_name": "edge of the token's patch in the original image"}
    here = (axis,)
    columns = (
        ArraySchema("sample_index", here, "int32", attrs=_SAMPLE),
        ArraySchema("position", here, "int32", attrs={"long_name": "place within the sample, from 0"}),
        enumeration("kind", here, KIND),
        ArraySchema("image_index", here, "int16", attrs={"long_name": "image within the sample, -1: none"}),
        ArraySchema("tile", here, "int16", attrs={"long_name": "crop of the image, -1: none"}),
        ArraySchema(
            "patch_row", here, "int16", attrs={"long_name": "row in the tile's token grid, -1: none"}
        ),
        ArraySchema(
            "patch_col", here, "int16", attrs={"long_name": "column in the tile's token grid, -1: none"}
        ),
        *(
            ArraySchema(name, here, "float32", attrs=pixels)
            for name in ("box_x0", "box_y0", "box_x1", "box_y1")
        ),
    )
    if axis == "patch":
        return columns
    return (
        *columns,
        ArraySchema("token_id", here, "int32"),
        ArraySchema("token_text", here, "string"),
        *(ArraySchema(f"is_{role}", here, "bool") for role in ROLES),
    )


def sample_columns(options: int, extra: Mapping[str, str] | None = None) -> tuple[ArraySchema, ...]:
    """The samples table; `extra` maps the dataset's own columns to their dtypes."""
    here, wide = ("sample",), ("sample", "option")
    sizes = {"option": options}
    text = (
        "sample_id",
        "question",
        "answer",
        "relation",
        "subject",
        "object",
        "group",
        "prompt",
        "prediction",
    )
    standard = (
        *(ArraySchema(name, here, "string") for name in text),
        ArraySchema("error", here, "string"),
        ArraySchema("options", wide, "string", sizes),
        ArraySchema("option_logits", wide, "float32", sizes, {"units": "logit"}),
        ArraySchema("answer_index", here, "int8", attrs={"long_name": "the right option, -1: unknown"}),
        enumeration("correct", here, CORRECT),
        enumeration("status", here, STATUS),
    )
    known = {array.name for array in standard}
    own = {name: dtype for name, dtype in (extra or {}).items() if name not in known}
    return (*standard, *(ArraySchema(name, here, dtype) for name, dtype in own.items()))


def image_groups(stored: bool) -> tuple[GroupSchema, ...]:
    """The table of images, and their encoded bytes end to end if they are `stored`."""
    here = ("image",)
    table = GroupSchema(
        "images",
        "image",
        (
            ArraySchema("sample_index", here, "int32", attrs=_SAMPLE),
            ArraySchema("image_index", here, "int16", attrs={"long_name": "image within the sample"}),
            ArraySchema("width", here, "int32", attrs={"units": "pixel"}),
            ArraySchema("height", here, "int32", attrs={"units": "pixel"}),
            ArraySchema("sha256", here, "string", attrs={"long_name": "of the encoded file"}),
            ArraySchema("start", here, "int64", attrs=_START),
            ArraySchema("length", here, "int64", attrs={"units": "byte"}),
        ),
    )
    if not stored:
        return (table,)
    return (table, GroupSchema("image_bytes", "byte", (ArraySchema("data", ("byte",), "uint8"),)))
