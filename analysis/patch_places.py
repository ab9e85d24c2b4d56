"""Which tokens of one sample take the place of which of another: by position, role or cell of the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError
from mechanistic.store.schema import KIND

from .token_places import BACKGROUND, Columns, default_places, place_masks, place_name

EVERY = "every"
Place = str | int
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sample: their labels, the further columns of its row, and its name."""

    table: Columns
    extra: Mapping[str, Any]
    sample_id: str

    def __len__(self) -> int:
        return len(self.table["position"])

    @property
    def image(self) -> Rows:
        """Where its image tokens are."""
        return np.flatnonzero(self.table["kind"] == KIND["image"])

    def mask(self, place: Place) -> NDArray[np.bool_]:
        """Which tokens are at a place. Raises like `place_masks`."""
        found: NDArray[np.bool_] = place_masks([self.table], [self.extra], [place], [self.sample_id])[0, 0]
        return found


def chosen_places(
    positions: Place | Sequence[Place] | None, pairs: Sequence[tuple[Tokens, Tokens]]
) -> list[Place]:
    """The places meant: all roles that every sample has for None, each position for ``every``."""
    if positions is None:
        every = [tokens for pair in pairs for tokens in pair]
        return list(default_places([each.table for each in every], [each.extra for each in every]))
    if positions == EVERY:
        return list(range(max(len(base) for base, _ in pairs)))
    return [positions] if isinstance(positions, str | int) else list(positions)


def matched_rows(place: Place, base: Tokens, source: Tokens) -> tuple[Rows, Rows]:
    """Rows of `base`, and the rows of `source` that take their place, one to one.

    A position is the same position. Of a role, words are matched from the last one back, and those that the
    other sample lacks stay as they are. Image tokens are matched by their place in the image: those that are
    at the place in either sample, of the background in both.

    Raises
    ------
    DataError    positions are asked for and the samples have different lengths; their images have different
                 numbers of tokens; or a sample has no token there.
    """
    if _absolute(place):
        _require_one_length(place, base, source)
        rows = np.flatnonzero(base.mask(place))
        return rows, rows
    own, other = base.mask(place), source.mask(place)
    images = base.image, source.image
    in_image = _image_cells(place, own[images[0]], other[images[1]], base, source)
    words = []
    for mask, image in ((own, images[0]), (other, images[1])):
        mask[image] = False
        words.append(np.flatnonzero(mask))
    count = min(map(len, words))
    first, second = (
        np.concatenate([image[in_image], word[len(word) - count :]])
        for image, word in zip(images, words, strict=True)
    )
    return first, second


def require_same_keys(base: Tokens, source: Tokens) -> None:
    """DataError unless attention in one sample can take the place of that in the other."""
    for name in ("position", "kind", "image_index", "tile", "patch_row", "patch_col"):
        own, other = (each.table[name] for each in (base, source))
        if name == "kind":
            own, other = (each == KIND["image"] for each in (own, other))
        if not np.array_equal(own, other):
            what = "images in different places"
            if len(own) != len(other):
                what = f"{len(base)} and {len(source)} tokens"
            raise DataError(
                f"Samples {base.sample_id!r} and {source.sample_id!r} have {what}, so a row of attention of "
                "the one does not fit the other.",
                "Pair samples of one length and image size, or patch z, q or k by role.",
            )


def _image_cells(
    place: Place, own: NDArray[np.bool_], other: NDArray[np.bool_], base: Tokens, source: Tokens
) -> Rows:
    if not own.any() and not other.any():
        return np.empty(0, np.int64)
    if len(own) != len(other):
        raise DataError(
            f"The images of {base.sample_id!r} and {source.sample_id!r} have {len(own)} and {len(other)} "
            f"tokens, so that '{place_name(place)}' cannot be matched.",
            "Pair samples whose images have one size, or choose roles of words.",
        )
    return np.flatnonzero(own & other if place == BACKGROUND else own | other)


def _absolute(place: Place) -> bool:
    return not isinstance(place, str) or place == "all" or re.match(r"@\d", place) is not None


def _require_one_length(place: Place, base: Tokens, source: Tokens) -> None:
    if len(base) != len(source):
        raise DataError(
            f"Samples {base.sample_id!r} and {source.sample_id!r} have {len(base)} and {len(source)} tokens, "
            f"so '{place_name(place)}' is not the same place in both.",
            f"Choose roles: positions={default_places([base.table], [base.extra])!r}.",
        )
