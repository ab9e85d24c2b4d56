"""AttentionCache: weights are those of eager attention, whatever the model runs on, and nothing is left."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llava, randomise, samples
from transformers import (
    BertConfig,
    BertModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import attention_entropy, plot_attention_heatmap
from mechanistic.capture import AttentionCache
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.tap import attention_configs
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run, site
from mechanistic.store.errors import CaptureError, SpecificationError, UsageError
from mechanistic.store.verify import verify_run

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
FIRST, LAST = "model.language_model.layers.0.self_attn", "model.language_model.layers.2.self_attn"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def batch(loaded: LoadedModel) -> Batch:
    return prepare_batch(loaded, samples(3), 0, max_new_tokens=1, texts=TokenTexts(loaded.tokenizer))


def run_model(loaded: LoadedModel, batch: Batch, **options: Any) -> Any:
    with torch.no_grad():
        return loaded.model(**batch.inputs, use_cache=False, **options)


def state(model: torch.nn.Module) -> list[Any]:
    """Everything that hooks and taps could leave behind."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return [hooks, [config._attn_implementation for config in attention_configs(model)]]


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)
    text = CLIPTextConfig(vocab_size=50, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **SMALL)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()


def divide_by_zero_inside(cache: AttentionCache, loaded: LoadedModel) -> None:
    with cache:
        cache.register_attention_hooks(loaded.model)
        _ = 1 // 0


def test_attention_cache__gives_eager_attention_of_a_model_that_runs_sdpa(
    loaded: LoadedModel, batch: Batch
) -> None:
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model)
        run_model(loaded, batch)
    loaded.model.set_attn_implementation("eager")
    try:
        expected = run_model(loaded, batch, output_attentions=True).attentions
    finally:
        loaded.model.set_attn_implementation("sdpa")
    valid = batch.inputs["attention_mask"].bool().numpy()
    for layer, weights in enumerate(expected):
        got = cache.get_attention(f"layer.{layer}")
        assert got.dims == ("batch", "head", "query", "key")
        rows = got.transpose("batch", "query", "head", "key").values[valid]
        np.testing.assert_allclose(rows, weights.transpose(1, 2).numpy()[valid], rtol=0, atol=1e-5)


def test_attention_cache__the_call_of_the_published_script(clip: CLIPModel, tmp_path: Path) -> None:
    name = "vision_model.encoder.layers.0.self_attn"
    cache = AttentionCache()
    hooks = cache.register_attention_hooks(clip, layer_names=[name])
    assert list(hooks) == [name]
    with torch.no_grad():
        clip(pixel_values=torch.randn(2, 3, 32, 32), input_ids=torch.tensor([[3, 4, 1], [5, 6, 1]]))
    attn_weights = cache.get_attention(name)
    cache.remove_hooks()
    assert attn_weights.shape == (2, 4, 17, 17)
    assert f"{attention_entropy(attn_weights).mean():.3f}" > "0"
    plot_attention_heatmap(attn_weights[0], save_path=tmp_path / "heat.png")
    assert attn_weights[0, 0, 0, 1:].shape == (16,)
    np.testing.assert_allclose(attn_weights.sum("key"), 1, atol=1e-5)


def test_attention_cache__leaves_the_model_as_it_was(loaded: LoadedModel, batch: Batch) -> None:
    before, plain = state(loaded.model), run_model(loaded, batch).logits
    cache = AttentionCache()
    with cache.register_attention_hooks(loaded.model):
        assert state(loaded.model) != before
        torch.testing.assert_close(run_model(loaded, batch).logits, plain, rtol=0, atol=0)
    assert state(loaded.model) == before
    torch.testing.assert_close(run_model(loaded, batch).logits, plain, rtol=0, atol=0)
    cache.remove_hooks()
    with pytest.raises(ZeroDivisionError):
        divide_by_zero_inside(AttentionCache(), loaded)
    assert state(loaded.model) == before


def test_attention_cache__survives_a_forward_that_fails(loaded: LoadedModel, batch: Batch) -> None:
    before = state(loaded.model)
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model, ["layer.1"])
        broken = {**batch.inputs, "input_ids": batch.inputs["input_ids"] * 0 + 10**6}
        with pytest.raises(Exception, match=r"index|range"), torch.no_grad():
            loaded.model(**broken)
        run_model(loaded, batch)
        assert cache.get_attention("layer.1").sizes["batch"] == 3
    assert state(loaded.model) == before


def test_attention_cache__a_cache_thrown_away_takes_its_hooks_along(loaded: LoadedModel) -> None:
    before = state(loaded.model)
    AttentionCache().register_attention_hooks(loaded.model)
    gc.collect()
    assert state(loaded.model) == before


def test_attention_cache__two_at_once_come_off_in_any_order(loaded: LoadedModel, batch: Batch) -> None:
    before = state(loaded.model)
    first, second = AttentionCache(), AttentionCache()
    first.register_attention_hooks(loaded.model, ["layer.0"])
    second.register_attention_hooks(loaded.model, ["layer.0"])
    first.remove_hooks()
    run_model(loaded, batch)
    second.remove_hooks()
    assert second.get_attention("layer.0").sizes["batch"] == 3
    with pytest.raises(UsageError, match="has run 0 times"):
        first.get_attention("layer.0")
    assert state(loaded.model) == before


def test_attention_cache__forwards_accumulate_until_cleared(loaded: LoadedModel, batch: Batch) -> None:
    short = {name: value[:1] for name, value in batch.inputs.items()}
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model, [FIRST])
        run_model(loaded, batch)
        with torch.no_grad():
            loaded.model(**short, use_cache=False)
        assert cache.get_attention(FIRST).sizes["batch"] == 1
        assert cache.get_attention(FIRST, forward=0).sizes["batch"] == 3
        with pytest.raises(UsageError, match="has run 2 times"):
            cache.get_attention(FIRST, forward=2)
        cache.clear()
        with pytest.raises(UsageError, match="has run 0 times"):
            cache.get_attention(FIRST)
        run_model(loaded, batch)
        assert cache.get_attention(FIRST).sizes["batch"] == 3


def test_attention_cache__generation_with_a_cache_of_keys(loaded: LoadedModel, batch: Batch) -> None:
    one = {name: value[:1] for name, value in batch.inputs.items()}
    length = one["input_ids"].shape[1]
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model, ["layer.2"])
        with torch.no_grad():
            loaded.model.generate(**one, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert cache.get_attention("layer.2", forward=0).shape == (1, 4, length, length)
        last = cache.get_attention("layer.2")
    assert last.shape == (1, 4, 1, length + 2)
    np.testing.assert_allclose(last.sum("key"), 1, atol=1e-5)


def test_attention_cache__names(loaded: LoadedModel, clip: CLIPModel) -> None:
    cache = AttentionCache()
    with pytest.raises(UsageError, match="not attached"):
        cache.get_attention("layer.0")
    assert cache.register_attention_hooks(loaded.model, ["language_model.layers.2"]).names == (LAST,)
    with pytest.raises(SpecificationError, match=r"'layer\.0' is not watched"):
        cache.get_attention("layer.0")
    cache.remove_hooks()
    with pytest.raises(SpecificationError, match=r"no attention module 'encoder.layer.9'") as missing:
        cache.register_attention_hooks(loaded.model, ["encoder.layer.9"])
    assert "model.language_model.layers.{0-2}.self_attn" in str(missing.value)
    with pytest.raises(SpecificationError, match=r"no 'layer.9': .* has 3 layers"):
        cache.register_attention_hooks(loaded.model, ["layer.9"])
    two = torch.nn.ModuleDict({"one": clip.text_model, "other": clip.vision_model})
    with pytest.raises(SpecificationError, match="does not say which stack"):
        cache.register_attention_hooks(two, ["layer.0"])
    with pytest.raises(SpecificationError, match="could be 2 modules"):
        cache.register_attention_hooks(clip, ["encoder.layers.0"])
    with pytest.raises(SpecificationError, match="no module that attends"):
        cache.register_attention_hooks(torch.nn.Linear(2, 2))


def test_attention_cache__encoder_layer_of_a_bert() -> None:
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **SMALL)).eval()
    randomise(model, 1)
    model.set_attn_implementation("sdpa")
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5], [6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    with AttentionCache() as cache, torch.no_grad():
        cache.register_attention_hooks(model, layer_names=["encoder.layer.2"])
        model(**inputs)
    got = cache.get_attention("encoder.layer.2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions[2].numpy()
    np.testing.assert_allclose(got.values[0], expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.values[1][:, :2], expected[1][:, :2], rtol=0, atol=1e-6)


def test_attention_cache__an_encoder_that_attends_in_pieces() -> None:
    """Qwen2.5-VL attends to each window, or each image, in a call of its own: blocks on the diagonal."""
    family = ZOO["qwen2_5_vl"]
    loaded = family.build()
    asked = zoo_samples(family)[:2]
    batch = prepare_batch(loaded, asked, 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    patches = sum(len(table["position"]) for table in batch.encoder)
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model)
        run_model(loaded, batch)
    for block in (0, 1):
        got = cache.get_attention(f"visual.blocks.{block}").values
        assert got.shape == (1, 4, patches, patches)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)
        image = np.concatenate([table["image_index"] + 10 * n for n, table in enumerate(batch.encoder)])
        assert (got[0, 0][image[:, None] != image] == 0).all()


def test_attention_cache__a_model_with_attention_code_of_its_own() -> None:
    model = BlipVisionModel(BlipVisionConfig(image_size=32, patch_size=8, **SMALL)).eval()
    randomise(model, 2)
    with AttentionCache() as cache, torch.no_grad():
        cache.register_attention_hooks(model)
        model(pixel_values=torch.randn(1, 3, 32, 32))
    got = cache.get_attention("layer.1")
    assert got.shape == (1, 4, 17, 17)
    np.testing.assert_allclose(got.sum("key"), 1, atol=1e-5)


def test_attention_cache__attention_that_cannot_be_seen_says_so() -> None:
    class OwnAttention(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states

    model = torch.nn.Sequential(OwnAttention())
    with AttentionCache() as cache:
        cache.register_attention_hooks(model, ["0"])
        model(torch.ones(1))
        with pytest.raises(CaptureError, match="was not seen"):
            cache.get_attention("0")


def test_attention_cache__bfloat16_weights_are_float32() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **SMALL)).eval()
    randomise(model, 3)
    ids = torch.tensor([[3, 4, 5, 6]])
    with AttentionCache() as cache, torch.no_grad():
        cache.register_attention_hooks(model)
        model(ids)
        exact = cache.get_attention("layer.1")
    with AttentionCache() as cache, torch.no_grad():
        cache.register_attention_hooks(model.to(torch.bfloat16))
        model(ids)
        rough = cache.get_attention("layer.1")
    assert (rough.dtype, rough.attrs["source_dtype"]) == (np.float32, "bfloat16")
    np.testing.assert_allclose(rough, exact, rtol=0, atol=0.1)
    np.testing.assert_allclose(rough.sum("key"), 1, atol=1e-5)


def test_to_run__is_a_run_with_the_same_weights(loaded: LoadedModel, batch: Batch, tmp_path: Path) -> None:
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model, ["layer.0", "layer.2"])
        run_model(loaded, batch)
        run_model(loaded, batch)
    path = cache.to_run(tmp_path / "run", processor=loaded.processor)
    assert verify_run(path) == []
    run = open_run(path)
    rows, weights = site(run, "text/pattern_rows"), site(run, "text/pattern")
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert np.bincount(rows["sample_index"].values).tolist() == lengths * 2
    assert weights["layer"].values.tolist() == [0, 2]
    np.testing.assert_array_equal(
        run["tokens/text"].to_dataset()["token_id"].values[: lengths[0]],
        batch.inputs["input_ids"][0, : lengths[0]].numpy(),
    )
    assert (run["tokens/text"].to_dataset()["kind"].values == 1).sum() == 6 * 64
    last = np.flatnonzero(rows["sample_index"].values == 4)[-1]
    start, length = int(rows["start"][last]), int(rows["length"][last])
    expected = cache.get_attention("layer.2")[1, :, lengths[1] - 1, : lengths[1]]
    np.testing.assert_array_equal(
        weights["pattern"].sel(layer=2).values[start : start + length], expected.values.T
    )


def test_to_run__of_decoder_and_encoder_or_of_an_encoder_alone(
    loaded: LoadedModel, batch: Batch, tmp_path: Path
) -> None:
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model)
        run_model(loaded, batch)
    both = open_run(cache.to_run(tmp_path / "both"))
    assert verify_run(tmp_path / "both") == []
    assert both["samples"].sizes["sample"] == 3
    assert set(both["text/pattern"].attrs) >= {"site", "stack", "tokens", "source_dtype"}
    tower = loaded.model.model.vision_tower
    with AttentionCache() as cache, torch.no_grad():
        cache.register_attention_hooks(tower)
        tower(torch.randn(2, 3, 64, 64))
    alone = open_run(cache.to_run(tmp_path / "alone"))
    assert verify_run(tmp_path / "alone") == []
    for run in (both, alone):
        weights, rows = site(run, "vision/pattern")["pattern"], site(run, "vision/pattern_rows")
        assert (rows["length"] == 65).all()
        sums = np.add.reduceat(weights.values, rows["start"].values, axis=1)
        np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-5)


def test_to_run__refuses_what_is_not_a_run(loaded: LoadedModel, batch: Batch, tmp_path: Path) -> None:
    with AttentionCache() as cache:
        cache.register_attention_hooks(loaded.model, ["layer.0"])
        with pytest.raises(UsageError, match="empty"):
            cache.to_run(tmp_path / "run")
        with torch.no_grad():
            loaded.model.generate(**{k: v[:1] for k, v in batch.inputs.items()}, max_new_tokens=2)
        with pytest.raises(UsageError, match="use_cache=False"):
            cache.to_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
