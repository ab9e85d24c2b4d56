"""A patching sweep as a grid: sites x layers x places x heads, for each pair of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechanistic.store.errors import SpecificationError

from .chosen_numbers import chosen_numbers
from .patch_places import EVERY, Place, Tokens, chosen_places, matched_rows, require_same_keys
from .token_places import place_name

PROJECTOR = "projector"
RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
PATTERN = "pattern"
OF_HEADS = {"q": "head", "z": "head", PATTERN: "head", "k": "kv_head", "v": "kv_head"}

Heads = str | int | Sequence[int] | None


@dataclass(frozen=True)
class PatchPlan:
    """`heads` are true numbers along the dimension `head_dim`, (None,) where none is told apart."""

    stack: str
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    places: tuple[Place, ...]
    every: bool
    heads: tuple[int | None, ...]
    head_dim: str | None

    @property
    def cells(self) -> list[tuple[Place, int | None]]:
        """Places and heads, as they stand on the last two axes."""
        return [(place, head) for place in self.places for head in self.heads]

    def dims(self) -> tuple[str, ...]:
        """The dimensions of a sweep behind `pair`."""
        place = "position" if self.every else "role"
        several = ("site",) if len(self.sites) > 1 else ()
        return (*several, "layer", place, *([self.head_dim] if self.head_dim else []))

    def coordinates(self) -> dict[str, Any]:
        """What lies along them."""
        labels: dict[str, Any] = {
            "site": list(self.sites),
            "layer": np.array(self.layers, np.int32),
            "position": np.array(self.places if self.every else [], np.int32),
            "role": [place_name(place) for place in self.places],
        }
        if self.head_dim:
            labels[self.head_dim] = np.array(self.heads, np.int32)
        return {name: labels[name] for name in self.dims()}

    def parameters(self) -> dict[str, Any]:
        """What decides the numbers of a sweep, as JSON knows it."""
        return {
            "stack": self.stack,
            "sites": list(self.sites),
            "layers": list(self.layers),
            "places": [place_name(place) for place in self.places],
            "heads": list(self.heads),
        }

    def rows(self, place: Place, base: Tokens, source: Tokens) -> Any:
        """Matched rows as `matched_rows` finds them, None for a position that the pair does not have."""
        if self.every and isinstance(place, int) and place >= max(len(base), len(source)):
            return None
        return matched_rows(place, base, source)


def patch_plan(
    anatomy: Any,
    sites: str | Sequence[str],
    layers: int | Sequence[int] | None,
    positions: Place | Sequence[Place] | None,
    heads: Heads,
    pairs: Sequence[tuple[Tokens, Tokens]],
) -> PatchPlan:
    """The grid that a call means.

    Raises
    ------
    SpecificationError    a site, layer or head that does not exist, or sites that do not share their axes.
    DataError             attention is patched, and samples of a pair do not have the same keys.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    stack, kept = _sites(names)
    if PATTERN in kept:
        for base, source in pairs:
            require_same_keys(base, source)
    if names == [PROJECTOR]:
        layers = 0 if layers is None else layers
        positions = "image" if positions is None else positions
    own = anatomy.stack(stack)
    kinds = {OF_HEADS.get(site) for site in kept}
    if len(kinds) > 1:
        raise SpecificationError(
            f"The sites {', '.join(names)} do not have the same heads.", "Sweep them one after the other."
        )
    dim = kinds.pop()
    if dim is None and heads is not None:
        raise SpecificationError(
            f"{names[0]} has no heads.", f"Leave heads out, or patch {', '.join(OF_HEADS)}."
        )
    together = dim is None or heads == "all"
    count = own.kv_heads if dim == "kv_head" else own.heads
    return PatchPlan(
        stack,
        kept,
        tuple(chosen_numbers(layers, len(own.layers), "layer", stack)),
        tuple(chosen_places(positions, pairs)),
        positions == EVERY,
        (None,) if together else tuple(chosen_numbers(heads, count, "head", stack)),
        None if together else dim,
    )


def _sites(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    known = (*RESIDUAL, *OF_HEADS)
    stacks, kept = set(), []
    for name in names:
        stack, site = stack_and_site(name)
        if site == PROJECTOR and len(names) == 1:
            # What the projector gives is what enters the decoder at the image's tokens.
            return "text", ("resid_pre",)
        if site not in known or stack not in ("text", "vision"):
            raise SpecificationError(
                f"There is no site '{name}' to patch.",
                f"The sites are {', '.join(known)}, of the encoder vision.SITE; or {PROJECTOR}, alone.",
            )
        stacks.add(stack)
        kept.append(site)
    if len(stacks) != 1:
        raise SpecificationError("The sites are of several stacks.", "Sweep them one after the other.")
    return stacks.pop(), tuple(dict.fromkeys(kept))


def stack_and_site(name: str) -> tuple[str, str]:
    """``vision.z`` and ``vision/z`` are of the encoder, ``z`` of the decoder."""
    stack, _, site = name.replace("/", ".").rpartition(".")
    return stack or "text", site
