"""Which tensors of an engine a specification needs, for which tokens; and what no engine gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechanistic.store.errors import SpecificationError

from .sites import ResolvedSite
from .specification import CROSS_SITES, ROW_SITES
from .token_table import Columns, select
from .vllm_rows import Wanted

# Tokens that an answer is among.
_WITH_ANSWER = {"all", "text", "answer"}


@dataclass(frozen=True)
class Plan:
    """By tensor, its layers and the tokens to keep of it: the union of what the sites ask for."""

    layers: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, sites: Sequence[ResolvedSite]) -> Plan:
        """What sites need; attention rows need every query and every key."""
        layers: dict[str, set[int]] = {}
        tokens: dict[str, set[str]] = {}
        for site in sites:
            rows = site.spec.site in ROW_SITES
            for name in ("q", "k") if rows else (site.spec.site,):
                layers.setdefault(name, set()).update(site.layers)
                tokens.setdefault(name, set()).update(("all",) if rows else site.spec.tokens)
        return cls(
            {name: tuple(sorted(each)) for name, each in layers.items()},
            {name: tuple(sorted(each)) for name, each in tokens.items()},
        )

    @classmethod
    def everything(cls, names: Sequence[str], layers: int) -> Plan:
        """Every token of these tensors, of all layers."""
        return cls(dict.fromkeys(names, tuple(range(layers))), dict.fromkeys(names, ("all",)))

    def selection(self, name: str) -> str:
        """The name of a tensor's selection of tokens."""
        return "+".join(self.tokens[name])

    def to_dict(self) -> dict[str, Any]:
        """What `vllm_recorder.Recorder` takes."""
        return {
            name: {"layers": list(layers), "selection": self.selection(name)}
            for name, layers in self.layers.items()
        }

    def wanted(self, prompt: Columns) -> dict[str, Any]:
        """By selection, what is wanted of a sample whose prompt has these labels: JSON-like."""
        found = {}
        for name, tokens in self.tokens.items():
            wanted = Wanted.of(select(prompt, tokens), answer=bool(_WITH_ANSWER & set(tokens)))
            found[self.selection(name)] = wanted.to_dict()
        return found


def everything_wanted(length: int) -> dict[str, Any]:
    """Every token of a prompt of this length, as `Plan.everything` names it."""
    return {"all": Wanted.of(np.ones(length, np.bool_), answer=True).to_dict()}


def check_sites(sites: Sequence[ResolvedSite]) -> None:
    """SpecificationError for a site of the vision encoder, or of cross-attention."""
    for site in sites:
        if site.spec.site in CROSS_SITES:
            raise SpecificationError(
                f"{site.spec.to_string()} cannot be captured on vLLM: it runs no cross-attention.",
                "Capture it with --backend transformers.",
            )
        if site.stack.name != "text":
            raise SpecificationError(
                f"{site.spec.to_string()} cannot be captured on vLLM: its image encoder runs ahead of "
                "the schedule, on images of several samples, and not again for an image that it has seen.",
                "Capture vision sites with --backend transformers, into a run of their own.",
            )
