"""The image encoder's attention, put together again from what an engine kept of it, segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mechanistic.store.errors import CaptureError

from .anatomy import Stack
from .encoder_masks import EncoderMasks, encoder_rule
from .mask_rules import MaskRule, describe
from .proof import StackProof
from .rebuilt_attention import rebuild
from .tap import AttentionCall
from .token_table import Columns
from .vllm_spool import Spool


def encoder_calls(
    spool: Spool,
    stack: Stack,
    layer: int,
    told: Mapping[str, Any],
    rule: MaskRule,
    tables: Sequence[Columns],
    *,
    whole: bool,
) -> Iterator[AttentionCall]:
    """One layer's attention over the images of samples, a call for each segment of its rule.

    Parameters
    ----------
    told
        What a worker said of the layer's calls: their scale.
    whole
        With values and head outputs; without, keys and queries stand in for them.
    """
    wanted = [np.arange(len(table["position"])) for table in tables]

    def rows(name: str, heads: int) -> Any:
        return spool.rows(f"vision/{name}", layer, "vision/all", wanted, heads)

    query, key = rows("q", stack.heads), rows("k", stack.kv_heads)
    value, output = (rows("v", stack.kv_heads), rows("z", stack.heads)) if whole else (key, query)
    segments = EncoderMasks(tables).segments(rule)
    starts = np.flatnonzero(np.diff(segments, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(segments)], strict=True):
        inside = slice(start, stop)
        yield AttentionCall(
            module=stack.layers[layer],
            query=query[inside].transpose(0, 1)[None],
            key=key[inside].transpose(0, 1)[None],
            value=value[inside].transpose(0, 1)[None],
            output=output[inside][None],
            mask=None,
            scale=told["scale"],
            softcap=None,
            window=None,
            sinks=None,
            position_bias=None,
            causal=False,
        )


def prove_encoder(
    spool: Spool,
    stack: Stack,
    config: Any,
    told: Mapping[str, Mapping[str, Any]],
    table: Columns,
    proof: StackProof,
    tolerance: float,
) -> None:
    """Put into `proof` the rule of each layer that the engine has, shown on the images of one sample.

    Raises
    ------
    CaptureError    the kernel gives something else than q, k and v under the rule.
    """
    for number, layer in sorted((int(name), layer) for name, layer in told.items()):
        rule = encoder_rule(config, number)
        for call in encoder_calls(spool, stack, number, layer, rule, [table], whole=True):
            sums, error = rebuild(call, stack, [call.query.shape[2]])
            proof.row_sum_error = max(proof.row_sum_error, sums)
            proof.output_error = max(proof.output_error, error)
            proof.attention[str(number)] = describe(rule, call)
        proof.rules[number] = rule
        if proof.output_error > tolerance or not layer["exact"]:
            raise CaptureError(
                f"vision.{number}: attention rebuilt from q and k by the rule '{rule.mask}' is off by "
                f"{proof.output_error:.2g} of the kernel's output (allowed: {tolerance:.0e}).",
                "Ask for its residual stream alone, or capture it with --backend transformers.",
            )
