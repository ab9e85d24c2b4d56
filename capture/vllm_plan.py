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
    """By tensor (``text/q``), its layers and the tokens to keep: the union of what the sites ask for."""

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
                tensor = f"{site.stack.name}/{name}"
                layers.setdefault(tensor, set()).update(site.layers)
                tokens.setdefault(tensor, set()).update(("all",) if rows else site.spec.tokens)
        return cls(
            {name: tuple(sorted(each)) for name, each in layers.items()},
            {name: tuple(sorted(each)) for name, each in tokens.items()},
        )

    @classmethod
    def everything(cls, names: Sequence[str], layers: Mapping[str, Sequence[int]]) -> Plan:
        """Every token of these tensors, in these layers by stack."""
        found = {f"{stack}/{name}": tuple(each) for stack, each in layers.items() for name in names}
        return cls(found, dict.fromkeys(found, ("all",)))

    def selection(self, name: str) -> str:
        """The name of a tensor's selection of tokens, such as ``text/all``."""
        return f"{stack_of(name)}/{'+'.join(self.tokens[name])}"

    def to_dict(self) -> dict[str, Any]:
        """What `vllm_recorder.Recorder` takes."""
        return {
            name: {"layers": list(layers), "selection": self.selection(name)}
            for name, layers in self.layers.items()
        }

    def wanted(self, labels: Mapping[str, Columns]) -> dict[str, Any]:
        """By selection, what is wanted of a sample with these labels by stack: JSON-like."""
        found = {}
        for name, tokens in self.tokens.items():
            stack = stack_of(name)
            answer = stack == "text" and bool(_WITH_ANSWER & set(tokens))
            found[self.selection(name)] = Wanted.of(select(labels[stack], tokens), answer=answer).to_dict()
        return found


def stack_of(tensor: str) -> str:
    """The stack of a tensor that a plan names."""
    return tensor.partition("/")[0]


def tensor_name(tensor: str, layer: int) -> str:
    """A tensor of one layer as a reader would name it, such as ``text.3.q``."""
    return tensor.replace("/", f".{layer}.")


def image_tokens(encoder: Columns) -> list[int]:
    """How many tokens the encoder makes of each image of a sample with these labels."""
    counts: list[int] = np.bincount(encoder["image_index"]).tolist()
    return counts


def check_sites(sites: Sequence[ResolvedSite]) -> None:
    """SpecificationError for a site of cross-attention, or of a stack that no engine has."""
    for site in sites:
        if site.spec.site in CROSS_SITES:
            raise SpecificationError(
                f"{site.spec.to_string()} cannot be captured on vLLM: it runs no cross-attention.",
                "Capture it with --backend transformers.",
            )
        if site.stack.name not in ("text", "vision"):
            raise SpecificationError(
                f"{site.spec.to_string()} cannot be captured on vLLM: whose tokens it is about is unknown.",
                "Capture it with --backend transformers.",
            )
