"""What is proven of an engine, on layers and kernels made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechanistic.capture.anatomy import Stack
from mechanistic.capture.mask_rules import MaskRule, SequenceLayout
from mechanistic.capture.proof import StackProof
from mechanistic.capture.residual import Halves
from mechanistic.capture.tap import AttentionCall
from mechanistic.capture.vllm_proof import (
    check_attention,
    check_layers,
    join_halves,
    kind_of,
    masked,
    prove_layer,
    warning_of,
)
from mechanistic.capture.vllm_stream import EngineLayerProbe, flat, stream_into, stream_out
from mechanistic.store.errors import CaptureError, ModelError

HEADS, KV_HEADS, WIDTH = 4, 2, 8
STACK = Stack("text", "layers", (nn.Identity(),), 32, HEADS, KV_HEADS, WIDTH, ("sample_index",))
BLOCKS = np.array([-1, 0, 0, 0, -1, 1, 1, -1, -1, -1], np.int16)
LAYOUT = SequenceLayout(BLOCKS, 8)


def kernel(rule: MaskRule, *, window: int | None = None, softcap: float | None = None) -> AttentionCall:
    """A call whose output was computed under a rule."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(1, heads, len(BLOCKS), WIDTH, generator=generator)

    call = AttentionCall(
        module=nn.Identity(),
        query=random(HEADS),
        key=random(KV_HEADS),
        value=random(KV_HEADS),
        output=torch.zeros(1),
        mask=None,
        scale=0.5,
        softcap=softcap,
        window=window,
        sinks=None,
        position_bias=None,
        causal=True,
    )
    pattern = masked(call, rule, [LAYOUT]).pattern()
    mixed = pattern @ call.value.repeat_interleave(HEADS // KV_HEADS, dim=1)
    return AttentionCall(**{**vars(call), "output": mixed.transpose(1, 2)})


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (MaskRule("causal"), None),
        (MaskRule("causal_image_blocks"), None),
        (MaskRule("prefix"), None),
        (MaskRule("sliding_window", 4), 4),
        (MaskRule("sliding_window_image_blocks", 3), 3),
        # A kernel that was told of a window and does not use it.
        (MaskRule("causal"), 4),
    ],
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prove_layer__finds_the_rule_by_what_the_kernel_gave(
    rule: MaskRule, window: int | None, softcap: float | None
) -> None:
    call = kernel(rule, window=window, softcap=softcap)
    found, error, sums = prove_layer(call, STACK, LAYOUT, 1e-5)
    assert found == rule
    assert max(error, sums) < 1e-6


def test_prove_layer__a_kernel_that_does_something_else_is_an_error() -> None:
    call = kernel(MaskRule("causal"))
    other = AttentionCall(**{**vars(call), "output": call.output * 1.01})
    with pytest.raises(CaptureError, match="under every mask rule"):
        prove_layer(other, STACK, LAYOUT, 1e-5)


@pytest.mark.parametrize(
    ("family", "mask", "expected"),
    [
        ("gemma3", "causal", True),
        ("gemma3", "causal_image_blocks", False),
        ("gemma3", "sliding_window_image_blocks", False),
        ("paligemma", "causal", True),
        ("paligemma", "prefix", False),
        ("llava", "causal", False),
    ],
)
def test_warning_of__is_given_where_the_model_masks_otherwise(family: str, mask: str, expected: bool) -> None:
    proof = StackProof(rules={0: MaskRule(mask)})
    said = warning_of(family, proof, "CPU_ATTN")
    assert (said is not None) == expected
    assert said is None or "not the model's own" in said


class HandSpool:
    """A spool that holds one call of one layer."""

    def __init__(self, call: AttentionCall) -> None:
        self.held = {
            "text/q": call.query[0].transpose(0, 1),
            "text/k": call.key[0].transpose(0, 1),
            "text/v": call.value[0].transpose(0, 1),
            "text/z": call.output[0],
        }

    def rows(self, name: str, *_: Any) -> Tensor:
        return self.held[name]

    def sinks(self, *_: Any) -> None:
        return None


def test_check_attention__another_sample_is_held_against_the_rule_of_the_first() -> None:
    spool: Any = HandSpool(kernel(MaskRule("causal")))
    told = [{"number": 0, "scale": 0.5, "softcap": None, "window": None}]
    check_attention(spool, STACK, LAYOUT, told, {0: MaskRule("causal")}, 1e-5)
    with pytest.raises(
        CaptureError, match=r"text\.0 attends by 'prefix' to the sample that proved it, and not"
    ):
        check_attention(spool, STACK, LAYOUT, told, {0: MaskRule("prefix")}, 1e-5)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([-1] * 3, (0, False, False)),
        ([-1] * 5, (0, True, False)),
        ([-1, 0, 0], (1, False, False)),
        ([0, -1, 1, -1, 2, -1, -1], (2, True, True)),
    ],
)
def test_kind_of__is_what_a_mask_may_depend_on(blocks: list[int], expected: tuple[int | bool, ...]) -> None:
    layers = [{"window": 4}, {"window": None}, {"window": 6}, {"window": 4}]
    assert kind_of(SequenceLayout(np.array(blocks, np.int16), len(blocks)), layers) == expected


class Norm(nn.Module):
    """A fused norm that, as on a GPU, works in place and returns the buffers that it was given."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual += x
        x.copy_(residual / residual.norm(dim=-1, keepdim=True))
        return x, residual


class Layer(nn.Module):
    """A decoder layer of the engine, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def test_engine_layer_probe__finds_the_halves_although_kernels_work_in_place() -> None:
    layer, hidden, residual = Layer(), torch.randn(6, 8), torch.randn(6, 8)
    active: list[bool] = []
    probe = EngineLayerProbe(layer, 1e-5, lambda: bool(active))
    before = hidden + residual
    with probe.watching(), torch.no_grad():
        layer(torch.arange(6), hidden.clone(), residual.clone())
        assert probe.found is None, "the engine's own warm-up is not looked at"
        active.append(True)
        out = layer(torch.arange(6), hidden, residual)
        layer(torch.arange(6), torch.randn(1, 8), torch.randn(1, 8))
    assert probe.pre is not None
    assert probe.post is not None
    torch.testing.assert_close(probe.pre, before, rtol=0, atol=0)
    torch.testing.assert_close(probe.post, out[0] + out[1])
    assert probe.found is not None
    assert probe.found[0] == Halves("self_attn", "mlp", True)


def test_stream_into__is_told_by_the_names_of_the_arguments() -> None:
    layer, positions, hidden, residual = Layer(), torch.arange(3), torch.ones(3, 8), torch.ones(3, 8) * 2
    assert len(stream_into(layer, (positions, hidden, None), {})) == 1
    both = stream_into(layer, (positions,), {"residual": residual, "hidden_states": hidden})
    torch.testing.assert_close(flat(both), torch.full((3, 8), 3.0))
    with pytest.raises(ModelError, match=r"Linear of the engine takes no hidden_states.*\n.*model_impl"):
        stream_into(nn.Linear(8, 8), (hidden,), {})


def test_stream_out__sums_a_pair_and_takes_the_first_of_others() -> None:
    hidden = torch.ones(2, 8)
    assert flat(stream_out((hidden, hidden))).max() == 2
    assert flat(stream_out((hidden, None))).max() == 1
    assert flat(stream_out((hidden, torch.ones(2, 4, 2)))).max() == 1
    # transformers' own classes have a leading axis of 1.
    assert flat(stream_out(hidden[None])).shape == (2, 8)


def test_join_halves__are_known_where_all_layers_agree() -> None:
    one = [{"attention": "self_attn", "mlp": "mlp", "has_middle": True, "middle": None}, 1e-7]
    other = [{**one[0], "mlp": "ffn"}, 1e-7]  # type: ignore[dict-item]
    for found, expected in (([one, one], True), ([one, other], False), ([one, None], False)):
        proof = StackProof()
        join_halves(proof, found)
        assert (proof.halves is not None) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"heads": 3}, "heads"), ({"kv_heads": 4}, "kv heads"), ({"alibi": True}, "bias by distance")],
)
def test_check_layers__refuses_what_the_configuration_does_not_say(
    changes: dict[str, Any], says: str
) -> None:
    told = {"number": 0, "heads": 2, "kv_heads": 1, "head_width": WIDTH, "value_width": WIDTH}
    told |= {"alibi": False, "type": "decoder"}
    check_layers([told], STACK, 2)
    with pytest.raises(ModelError, match=says):
        check_layers([told | changes], STACK, 2)
    with pytest.raises(ModelError, match="2 decoder layers, its configuration 1"):
        check_layers([told, told], STACK, 2)
