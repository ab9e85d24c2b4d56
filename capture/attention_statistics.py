"""The site attn_stats: a few numbers of every attention row, computed while the model runs.

They are what `mechanistic.analysis` computes from stored q and k, under the same names, for rows and models
of which one would rather not store q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechanistic.store.errors import CaptureError
from mechanistic.store.schema import KIND, ArraySchema

from .attention_rows import row_blocks
from .tap import AttentionCall

# How many of the strongest keys are named, and counted together in attention_concentration.
STRONGEST = 5

KINDS = ("image", "text", "special", "answer")
MASSES = (*(f"mass_{kind}" for kind in KINDS), "mass_first")

_SHARE = {"units": "1"}
MEANINGS: Mapping[str, Mapping[str, Any]] = {
    "attention_entropy": {"units": "nat", "long_name": "Shannon entropy of the attention row"},
    "attention_concentration": {
        **_SHARE,
        "long_name": f"attention mass on the {STRONGEST} strongest keys",
        "k": STRONGEST,
    },
    "attention_max": {**_SHARE, "long_name": "attention weight of the strongest key"},
    **{f"mass_{kind}": {**_SHARE, "long_name": f"attention mass on {kind} tokens"} for kind in KINDS},
    "mass_first": {**_SHARE, "long_name": "attention mass on the first token"},
}
TOP = "top_position"
TOP_MEANING = {"long_name": "position within the sample of the strongest keys, strongest first; -1: none"}


@dataclass(frozen=True)
class Keys:
    """The keys of one sequence in the model's order: kind, and position within the sample."""

    kind: NDArray[np.int8]
    position: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.kind)

    def members(self) -> NDArray[np.float32]:
        """(key, mass): 1 where the key counts for a mass of `MASSES`."""
        columns = [*(self.kind == KIND[kind] for kind in KINDS), self.position == 0]
        return np.stack(columns, axis=-1).astype(np.float32)


def statistics_arrays(layers: int, axis: str, heads: int) -> tuple[ArraySchema, ...]:
    """The arrays of the group attn_stats."""
    sizes = {"layer": layers, "head": heads}
    dims = ("layer", axis, "head")
    return (
        *(
            ArraySchema(name, dims, "float32", sizes, meaning, beside=len(MEANINGS))
            for name, meaning in MEANINGS.items()
        ),
        ArraySchema(TOP, (*dims, "rank"), "int32", {**sizes, "rank": STRONGEST}, TOP_MEANING),
    )


def row_statistics(
    call: AttentionCall,
    sequence: int,
    queries: Tensor,
    keys: Keys,
    *,
    ahead: bool,
    block_bytes: int | None = None,
) -> dict[str, NDArray[Any]]:
    """The statistics of some rows of one sequence, each (row, head), and top_position (row, head, rank).

    With p the weights of a row: entropy -sum p log p; concentration, the sum of the 5 largest; the maximum;
    masses, sums over the keys of a kind. In a layer with an attention sink p sums to less than 1.

    Parameters
    ----------
    queries, ahead
        See `row_blocks`.

    Returns
    -------
    NaN, and -1, where a query may look at no key.
    """
    device, heads = call.query.device, call.query.shape[1]
    members = torch.from_numpy(keys.members()).to(device)
    numbers = torch.empty(len(queries), heads, len(MEANINGS), device=device)
    strongest = torch.full((len(queries), heads, STRONGEST), -1, dtype=torch.int64, device=device)
    for block in row_blocks(call, sequence, queries, len(keys), ahead=ahead, block_bytes=block_bytes):
        stop = block.scores.shape[-1]
        totals = block.totals[..., None]
        masses = block.exponentials @ members[:stop] / totals
        largest, places = block.exponentials.topk(min(STRONGEST, stop), dim=-1)
        # -sum p log p with p = e / Z and log p = s - log Z; the shares sum to 1 unless there is a sink.
        held = block.exponentials.sum(-1, keepdim=True) / totals
        expected = (block.scores.mul_(block.exponentials)).sum(-1, keepdim=True) / totals
        entropy = (totals.log() * held - expected).clamp_min(0)
        concentration = largest.sum(-1, keepdim=True) / totals
        parts = [entropy, concentration, largest[..., :1] / totals, masses]
        numbers[block.rows] = torch.cat(parts, -1).transpose(0, 1)
        places = places.masked_fill((largest <= 0) | totals.isnan(), -1)
        strongest[block.rows, :, : places.shape[-1]] = places.transpose(0, 1)
    values = numbers.cpu().numpy()
    found = strongest.cpu().numpy()
    named = {name: values[..., place] for place, name in enumerate(MEANINGS)}
    return {**named, TOP: np.where(found < 0, -1, keys.position[found]).astype(np.int32)}


def require_finite(statistics: Mapping[str, NDArray[Any]], where: str) -> None:
    """CaptureError if a row could not be computed: every token of a prompt sees at least itself."""
    if not np.isfinite(statistics["attention_entropy"]).all():
        raise CaptureError(
            f"{where}: its attention is not finite.",
            "The model overflows: load it with dtype=float32 or bfloat16, or leave that sample out.",
        )
