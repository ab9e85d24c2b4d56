"""ActivationCache: outputs are those that plain hooks see, and nothing is left on the model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Listed, llava, samples

from mechanistic.capture import ActivationCache, capture_run
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run, site
from mechanistic.store.errors import OutputExistsError, SpecificationError, UsageError
from mechanistic.store.verify import verify_run

LAYER = "model.language_model.layers.1"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def batch(loaded: LoadedModel) -> Batch:
    return prepare_batch(loaded, samples(3), 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))


def run_model(loaded: LoadedModel, batch: Batch, **options: Any) -> Any:
    with torch.no_grad():
        return loaded.model(**batch.inputs, use_cache=False, **options)


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def divide_by_zero_inside(cache: ActivationCache, loaded: LoadedModel) -> None:
    with cache:
        cache.register_hooks(loaded.model)
        _ = 1 // 0


def test_activation_cache__keeps_hidden_states(loaded: LoadedModel, batch: Batch) -> None:
    with ActivationCache() as cache:
        hooks = cache.register_hooks(loaded.model)
        states = run_model(loaded, batch, output_hidden_states=True).hidden_states
    assert len(hooks) == 5
    for layer in range(2):
        got = cache.get(f"layer.{layer}")
        assert got.dims == ("batch", "token", "feature")
        np.testing.assert_array_equal(got.values, states[layer + 1].numpy())
    assert cache.get("vision_tower.encoder.layers.1").sizes["token"] == 65


def test_activation_cache__any_module_by_its_path_or_the_end_of_it(loaded: LoadedModel, batch: Batch) -> None:
    names = ["layers.2.mlp.down_proj", "lm_head", LAYER]
    with ActivationCache() as cache:
        hooks = cache.register_hooks(loaded.model, layer_names=names)
        logits = run_model(loaded, batch).logits
    assert hooks.names == ("model.language_model.layers.2.mlp.down_proj", "lm_head", LAYER)
    np.testing.assert_array_equal(cache.get("lm_head").values, logits.numpy())
    assert cache.get("layer.1").attrs["layer_name"] == LAYER


def test_activation_cache__leaves_the_model_as_it_was(loaded: LoadedModel, batch: Batch) -> None:
    before, plain = hooks_on(loaded.model), run_model(loaded, batch).logits
    cache = ActivationCache()
    cache.register_hooks(loaded.model)
    torch.testing.assert_close(run_model(loaded, batch).logits, plain, rtol=0, atol=0)
    cache.remove_hooks()
    cache.remove_hooks()
    assert hooks_on(loaded.model) == before
    with pytest.raises(ZeroDivisionError):
        divide_by_zero_inside(ActivationCache(), loaded)
    ActivationCache().register_hooks(loaded.model)
    gc.collect()
    assert hooks_on(loaded.model) == before
    torch.testing.assert_close(run_model(loaded, batch).logits, plain, rtol=0, atol=0)
    assert cache.get("layer.0").sizes["batch"] == 3


def test_activation_cache__is_not_changed_by_what_the_model_does_later(
    loaded: LoadedModel, batch: Batch
) -> None:
    with ActivationCache() as cache:
        cache.register_hooks(loaded.model, ["layer.0"])
        handle = loaded.model.get_submodule("model.language_model.layers.0").register_forward_hook(
            lambda _, args, output: output.zero_()
        )
        run_model(loaded, batch)
        handle.remove()
    assert float(np.abs(cache.get("layer.0")).max()) > 0


def test_activation_cache__forwards_accumulate_until_cleared(loaded: LoadedModel, batch: Batch) -> None:
    with ActivationCache() as cache:
        cache.register_hooks(loaded.model, ["layer.0"])
        run_model(loaded, batch)
        with torch.no_grad():
            loaded.model(**{name: value[:1] for name, value in batch.inputs.items()})
        assert [cache.get("layer.0", forward=n).sizes["batch"] for n in (0, 1, -1)] == [3, 1, 1]
        cache.clear()
        with pytest.raises(UsageError, match="has run 0 times"):
            cache.get("layer.0")
        cache.register_hooks(loaded.model, ["layer.2"])
        run_model(loaded, batch)
        with pytest.raises(UsageError, match="has run 0 times"):
            cache.get("layer.0")
        assert cache.get("layer.2").sizes["batch"] == 3


def test_activation_cache__names_that_do_not_exist_list_those_that_do(loaded: LoadedModel) -> None:
    cache = ActivationCache()
    with pytest.raises(UsageError, match=r"not attached to a model\.\n  Call register_hooks"):
        cache.get("layer.0")
    with pytest.raises(SpecificationError, match=r"no module 'encoder.layer.5'") as missing:
        cache.register_hooks(loaded.model, ["encoder.layer.5"])
    assert "model.language_model.layers.{0-2}" in str(missing.value)
    with pytest.raises(SpecificationError, match="has 3 layers"):
        cache.register_hooks(loaded.model, ["layer.3"])
    with pytest.raises(SpecificationError, match="could be 5 modules"):
        cache.register_hooks(loaded.model, ["self_attn"])
    with pytest.raises(SpecificationError, match="no list of layers"):
        cache.register_hooks(torch.nn.Linear(2, 2))


def test_to_run__holds_what_a_capture_of_the_same_prompts_holds(
    loaded: LoadedModel, batch: Batch, tmp_path: Path
) -> None:
    with ActivationCache() as cache:
        cache.register_hooks(loaded.model)
        run_model(loaded, batch)
    path = cache.to_run(tmp_path / "cache", processor=loaded.processor)
    assert verify_run(path) == []
    capture_run(
        loaded,
        Listed(samples(3)),
        tmp_path / "run",
        sites=["text.*.resid_post", "vision.*.resid_post"],
        max_new_tokens=0,
        quiet=True,
    )
    mine, other = open_run(path), open_run(tmp_path / "run")
    for stack in ("text", "vision"):
        got, expected = site(mine, f"{stack}/resid_post"), site(other, f"{stack}/resid_post")
        np.testing.assert_array_equal(got["sample_index"], expected["sample_index"])
        np.testing.assert_array_equal(got["position"], expected["position"])
        np.testing.assert_allclose(got["resid_post"], expected["resid_post"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(mine["tokens/text/token_text"], other["tokens/text/token_text"])
    with pytest.raises(OutputExistsError):
        cache.to_run(path)


def test_to_run__refuses_what_is_not_a_layer(loaded: LoadedModel, batch: Batch, tmp_path: Path) -> None:
    with ActivationCache() as cache:
        cache.register_hooks(loaded.model, ["lm_head"])
        run_model(loaded, batch)
    with pytest.raises(SpecificationError, match="'lm_head' is not what a run calls resid_post"):
        cache.to_run(tmp_path / "run")


def test_activation_cache__bfloat16_becomes_float32_exactly(batch: Batch) -> None:
    half = llava(dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    handle = half.model.get_submodule(LAYER).register_forward_hook(lambda _, a, out: seen.append(out.clone()))
    inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in batch.inputs.items()}
    with ActivationCache() as cache, torch.no_grad():
        cache.register_hooks(half.model, ["layer.1"])
        half.model(**inputs)
    handle.remove()
    got = cache.get("layer.1")
    assert (got.dtype, got.attrs["source_dtype"]) == (np.float32, "bfloat16")
    np.testing.assert_array_equal(got.values, seen[0].float().numpy())
