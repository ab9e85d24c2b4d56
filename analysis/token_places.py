"""Places in a prompt by name, as the labels of its tokens know them: roles, boxes in the image, positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError
from mechanistic.store.schema import KIND

from .attention_boxes import patches_in_box
from .token_selection import token_mask

_BOXES = ("subject", "object")
_EDGES = ("x0", "y0", "x1", "y1")
BACKGROUND = "background"

Columns = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]


def default_places(tables: Sequence[Columns], extras: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The roles that every sample has, among boxes, background, image, subject, object, relation and last.

    The image as a whole is named only where no boxes divide it.
    """
    boxes = [f"{name}_box" for name in _BOXES]
    # An encoder's tokens are no words.
    words = all("is_subject" in table for table in tables)
    candidates = [*boxes, BACKGROUND, "image", *(["subject", "object", "relation", "last"] if words else [])]
    there = [
        name
        for name in candidates
        if all(_mask(table, extra, name).any() for table, extra in zip(tables, extras, strict=True))
    ]
    boxed = any(box in there for box in boxes)
    return tuple(name for name in there if name != ("image" if boxed else BACKGROUND))


def place_masks(
    tables: Sequence[Columns],
    extras: Sequence[Mapping[str, Any]],
    places: Sequence[str | int],
    sample_ids: Sequence[str],
) -> Mask:
    """Which tokens are at each place: (place, sample, token); padding is at none.

    Parameters
    ----------
    tables, extras
        Of each sample, the labels of its tokens, and the further columns of its row, which hold its boxes.
    places
        Selections as `select_tokens` takes them; a position; ``subject_box`` and ``object_box``, the image
        patches that share at least half of the smaller area with the box NAME_x0, NAME_y0, NAME_x1, NAME_y1;
        ``background``, the image patches in neither.

    Raises
    ------
    SpecificationError    a place does not parse.
    DataError             a sample has no token at a place.
    """
    width = max(len(table["position"]) for table in tables)
    masks = np.zeros((len(places), len(tables), width), bool)
    for row, (table, extra, name) in enumerate(zip(tables, extras, sample_ids, strict=True)):
        for number, place in enumerate(places):
            found = _mask(table, extra, place_name(place))
            if not found.any():
                raise DataError(
                    f"Sample {name!r} has no token at '{place_name(place)}', of its {len(found)} tokens.",
                    f"Choose others; it has: {', '.join(default_places([table], [extra]))}, and @0 to "
                    f"@{len(found) - 1}.",
                )
            masks[number, row, : len(found)] = found
    return masks


def place_name(place: str | int) -> str:
    """The name of a place; a position p is '@p'."""
    return place if isinstance(place, str) else f"@{place}"


def _mask(table: Columns, extra: Mapping[str, Any], name: str) -> Mask:
    if name == BACKGROUND:
        boxes = [_in_box(table, extra, box) for box in _BOXES]
        return np.asarray((table["kind"] == KIND["image"]) & ~np.any(boxes, axis=0))
    if name.removesuffix("_box") != name:
        return _in_box(table, extra, name.removesuffix("_box"))
    labels = xr.Dataset({key: ("token", values) for key, values in table.items()})
    return token_mask(labels, name)


def _in_box(table: Columns, extra: Mapping[str, Any], name: str) -> Mask:
    """The patches of the first image that are in a box; none where the sample has no such box."""
    edges = [f"{name}_{edge}" for edge in _EDGES]
    if not all(edge in extra for edge in edges):
        return np.zeros(len(table["kind"]), bool)
    box = np.array([extra[edge] for edge in edges], np.float32)
    if not (box[2] > box[0] and box[3] > box[1]):
        return np.zeros(len(table["kind"]), bool)
    image = (table["kind"] == KIND["image"]) & (table["image_index"] == 0)
    return np.asarray(image & patches_in_box(table, box))
