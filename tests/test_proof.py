"""The proof at attach: it passes on models that can be captured, and names what is wrong with the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import llava, randomise, samples
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mechanistic.capture.anatomy import find_anatomy
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.proof import Proof, prove
from mechanistic.capture.readout import apply_norm, build_readout
from mechanistic.capture.residual import require_halves
from mechanistic.capture.sites import resolve_sites
from mechanistic.capture.specification import parse_sites
from mechanistic.capture.token_table import TokenTexts
from mechanistic.capture.train_architecture import END, PAD, VOCABULARY, build_processor
from mechanistic.store.errors import CaptureError, ModelError

SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": END,
    "bos_token_id": END,
    "pad_token_id": PAD,
}
TEXT_MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, eos_token_id=END, bos_token_id=END
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=6)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "opt": lambda: opt(do_layer_norm_before=True),
}
EXPECTED = {
    "gpt2": (["causal"], "output of attn", "layer", 0.0),
    "gemma2": (["causal", "sliding_window"], "output of post_attention_layernorm", "rms", 1.0),
    "mistral": (["sliding_window"], "output of self_attn", "rms", 0.0),
    "gpt-neox": (["causal"], "output of attention", "layer", 0.0),
    "opt": (["causal"], "output of self_attn", "layer", 0.0),
}


def opt(*, do_layer_norm_before: bool) -> OPTForCausalLM:
    """OPT, whose norms are ahead of the halves of a layer, or as in its 350M behind them."""
    shape = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 99}
    return OPTForCausalLM(OPTConfig(**SMALL, **shape, do_layer_norm_before=do_layer_norm_before))


def text_model(name: str) -> LoadedModel:
    model = TEXT_MODELS[name]().eval()
    randomise(model, 0)
    return LoadedModel(model, build_processor().tokenizer, name)


def batch_of(loaded: LoadedModel, *, images: bool = True) -> Batch:
    asked = [sample if images else replace(sample, images=()) for sample in samples(1)]
    texts = TokenTexts(loaded.tokenizer)
    return prepare_batch(loaded, asked, 0, max_new_tokens=2, texts=texts)


def prove_it(loaded: LoadedModel, *, images: bool = True) -> Proof:
    return prove(loaded, batch_of(loaded, images=images), loaded.anatomy.stacks.keys())


def test_prove__says_what_it_found_and_how_exactly() -> None:
    proof = prove_it(llava())
    report = proof.attributes["stacks"]
    assert {name: report[name]["taps"] for name in report} == {"text": 3, "vision": 2}
    assert proof.attributes["logits_change"] == 0
    for stack in report.values():
        assert stack["attention_output_error"] < 1e-5
        assert stack["row_sum_error"] < 1e-5
        assert stack["resid_post_is_next_resid_pre"]
        assert stack["halves"]["attn_out"] == "output of self_attn"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prove__holds_in_half_precision(dtype: torch.dtype) -> None:
    prove_it(llava(dtype=dtype))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_prove__finds_its_way_in_decoders_without_images(name: str) -> None:
    loaded = text_model(name)
    report = prove_it(loaded, images=False).attributes["stacks"]["text"]
    masks, attention, kind, offset = EXPECTED[name]
    assert report["masks"] == masks
    assert report["halves"]["attn_out"] == attention
    built = build_readout(loaded.anatomy, loaded.model, {7: "left"})
    assert built is not None
    assert (built[1]["norm_kind"], built[1]["weight_offset"]) == (kind, offset)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_build_readout__turns_the_last_residual_into_the_models_logits(name: str) -> None:
    loaded = text_model(name)
    ids = torch.tensor([[5, 9, 11, 20]])
    kept: list[Tensor] = []
    handle = (
        loaded.anatomy.stack("text")
        .layers[-1]
        .register_forward_hook(
            lambda _, args, output: kept.append(output if isinstance(output, Tensor) else output[0])
        )
    )
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits[0]
    handle.remove()
    built = build_readout(loaded.anatomy, loaded.model, {7: "left", 12: "right"})
    assert built is not None
    readout, attrs = built
    weight = torch.from_numpy(readout.final_norm_weight.values) + attrs["weight_offset"]
    normed = apply_norm(kept[0][0], attrs["norm_kind"], attrs["eps"], weight)
    if "final_norm_bias" in readout:
        normed = normed + torch.from_numpy(readout.final_norm_bias.values)
    got = normed @ torch.from_numpy(readout.unembed.values).T
    if attrs["softcap"] is not None:
        got = torch.tanh(got / attrs["softcap"]) * attrs["softcap"]
    torch.testing.assert_close(got, logits[:, [7, 12]], rtol=1e-4, atol=1e-5)
    assert readout.word.values.tolist() == ["left", "right"]


def test_prove__parallel_attention_and_mlp_have_no_middle() -> None:
    halves = prove_it(text_model("gpt-neox"), images=False).halves["text"]
    require_halves("text", "attn_out", halves)
    with pytest.raises(ModelError, match="side by side"):
        require_halves("text", "resid_mid", halves)


def test_prove__a_layer_that_scales_what_it_adds_has_no_halves() -> None:
    loaded = llava()
    for layer in loaded.anatomy.stack("text").layers:
        layer.register_forward_hook(lambda _, args, output: output * 1.5)
    with pytest.raises(ModelError, match=r"'text\.\*\.attn_out' is not defined.*\n.*resid_pre"):
        require_halves("text", "attn_out", prove_it(loaded).halves["text"])


def test_prove__norms_behind_the_sums_leave_no_halves() -> None:
    model = opt(do_layer_norm_before=False).eval()
    randomise(model, 0)
    loaded = LoadedModel(model, build_processor().tokenizer, "opt")
    halves = prove_it(loaded, images=False).halves["text"]
    for site in ("attn_out", "resid_mid", "mlp_out"):
        with pytest.raises(ModelError, match=r"no two modules of a layer add up to it"):
            require_halves("text", site, halves)


class OwnAttention(nn.Module):
    """Attention that asks nobody."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.mix(hidden_states), None


def test_prove__attention_that_cannot_be_seen_is_refused() -> None:
    loaded = llava()
    loaded.anatomy.stack("text").layers[1].self_attn = OwnAttention(32)
    with pytest.raises(ModelError, match=r"attention of only 2 of 3 layers can be seen; not 1\."):
        prove_it(loaded)


def test_prove__of_stacks_whose_attention_is_not_wanted_only_the_residual_is_looked_at() -> None:
    loaded = llava()
    loaded.anatomy.stack("text").layers[1].self_attn = OwnAttention(32)
    proof = prove(loaded, batch_of(loaded), ["vision"])
    assert proof.rules["vision"]
    assert not proof.rules["text"]


def test_prove__shapes_must_be_what_the_configuration_says() -> None:
    loaded = llava()
    stack = replace(loaded.anatomy.stack("text"), kv_heads=4)
    wrong = replace(loaded.anatomy, stacks={**loaded.anatomy.stacks, "text": stack})
    loaded.__dict__["anatomy"] = wrong
    with pytest.raises(ModelError, match=r"text\.0: heads, kv heads and head width are \(4, 2, 8\)"):
        prove_it(loaded)


def test_prove__attention_that_q_and_k_do_not_explain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    honest = sdpa_attention.sdpa_attention_forward

    def tilted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return honest(module, query * 1.5, *args, **kwargs)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", tilted)
    with pytest.raises(CaptureError):
        prove_it(llava())


def test_find_anatomy__lists_everything_it_could_not_establish() -> None:
    loaded = llava()
    loaded.model.model.vision_tower.encoder.layers = nn.ModuleList()
    loaded.model.config.image_token_id = None
    with pytest.raises(ModelError, match=r"needs an adapter") as caught:
        find_anatomy(loaded.model)
    assert "the vision stack: no list of layers with attention under model.vision_tower" in caught.value.what
    assert "the id of the image token" in caught.value.what


def test_resolve_sites__a_stack_that_is_not_there_names_those_that_are() -> None:
    loaded = text_model("gpt2")
    with pytest.raises(ModelError, match=r"no vision stack\.\n.*text"):
        resolve_sites(parse_sites(["vision.*.q"]), loaded.anatomy, "float32")
