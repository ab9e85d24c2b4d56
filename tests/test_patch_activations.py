"""The users' call, and the number they compare outputs by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llava, picture, samples

from mechanistic.analysis import causal_effect_strength, patch_activations
from mechanistic.capture.dataset import open_image
from mechanistic.capture.models import LoadedModel, load_model
from mechanistic.capture.prompts import build_prompt, encode_prompts
from mechanistic.capture.shapes import Shapes
from mechanistic.store.errors import DataError, DimensionError, SpecificationError, UsageError


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("spatial-tiny")


def pair(number: int) -> tuple[Any, str]:
    sample = Shapes(8)[number]
    return sample.images[0], sample.question


def processed(loaded: LoadedModel, number: int) -> dict[str, Any]:
    sample = Shapes(8)[number]
    prompt = build_prompt(loaded.processor, sample)
    return encode_prompts(loaded.processor, [prompt], [[open_image(sample.images[0])]]).inputs


def hooks(loaded: LoadedModel) -> int:
    """How many there are; the library installs some of its own in the first forward."""
    with torch.no_grad():
        loaded.model(**processed(loaded, 0))
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.model.modules()
    )


def test_patch_activations__as_users_call_it(tiny: LoadedModel) -> None:
    with torch.no_grad():
        clean, corrupt = (tiny.model(**processed(tiny, number)) for number in (0, 1))
    everything = patch_activations(tiny, pair(0), pair(1), ["layer.3"])
    torch.testing.assert_close(everything.logits, clean.logits, rtol=0, atol=1e-5)
    assert causal_effect_strength(clean, everything) == pytest.approx(0, abs=1e-9)
    left, right = (tiny.tokenizer.convert_tokens_to_ids(word) for word in ("left", "right"))
    patched = patch_activations(
        model=tiny.model,
        clean_input=processed(tiny, 0),
        corrupt_input=processed(tiny, 1),
        layer_names=["language_model.layers.2"],
        positions=[-1],
    )
    share = causal_effect_strength(clean, patched, metric="recovered", answers=(left, right), corrupt=corrupt)
    assert 0.05 < share < 0.6
    through_pairs = patch_activations(
        tiny.model, pair(0), pair(1), ["layer.2"], positions=[-1], processor=tiny.processor
    )
    torch.testing.assert_close(through_pairs.logits, patched.logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        again = tiny.model(**processed(tiny, 1))
    torch.testing.assert_close(again.logits, corrupt.logits, rtol=0, atol=0)


def test_patch_activations__reaches_what_is_read_from_the_encoders_last_layer() -> None:
    model, (sample, *_) = llava(), samples(1)
    given = [(picture(seed), sample.question) for seed in (1, 2)]
    layer = "model.vision_tower.encoder.layers.1"
    patched = patch_activations(model, *given, [layer])
    clean = patch_activations(model, given[0], given[0], [layer])
    torch.testing.assert_close(patched.logits, clean.logits, rtol=0, atol=1e-6)


def test_patch_activations__says_what_is_wrong(tiny: LoadedModel) -> None:
    before = hooks(tiny)
    with pytest.raises(SpecificationError, match=r"There is no 'layers\.77'"):
        patch_activations(tiny, pair(0), pair(1), ["layers.77"])
    with pytest.raises(SpecificationError, match=r"No layer is named.*\n.*layer_names=\["):
        patch_activations(tiny, pair(0), pair(1), [])
    longer = (pair(1)[0], pair(1)[1] + " the")
    with pytest.raises(DataError, match=r"layer.1 gives .* in the corrupt run.*\n.*positions=\[-1\]"):
        patch_activations(tiny, pair(0), longer, ["layer.1"])
    with pytest.raises(DataError, match="no position 500"):
        patch_activations(tiny, pair(0), longer, ["layer.1"], positions=[500])
    with pytest.raises(UsageError, match=r"no input of a model: int"):
        patch_activations(tiny, 3, pair(1), ["layer.1"])
    assert hooks(tiny) == before


def test_causal_effect_strength__by_hand() -> None:
    clean, patched, corrupt = np.array([2.0, 0.0]), np.array([1.0, 0.0]), np.array([0.0, 2.0])
    assert causal_effect_strength(clean, patched) == 0.5
    assert causal_effect_strength(clean, patched, metric="cosine") == pytest.approx(0)
    assert causal_effect_strength(clean, corrupt, metric="cosine") == pytest.approx(1)
    assert causal_effect_strength(clean, patched, metric="logit_diff", answers=(0, 1)) == -1
    share = causal_effect_strength(clean, patched, metric="recovered", answers=(0, 1), corrupt=corrupt)
    assert share == pytest.approx(3 / 4)
    p, q = (np.exp(each) / np.exp(each).sum() for each in (clean, patched))
    expected = float((p * np.log(p / q)).sum())
    assert causal_effect_strength(clean, patched, metric="kl") == pytest.approx(expected)
    tensor = torch.tensor([[[9.0, 9.0], [2.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    assert causal_effect_strength(tensor, patched[None]) == 0.5
    assert causal_effect_strength(tensor, np.zeros((1, 2, 2)), position=0) == 81


def test_causal_effect_strength__says_what_is_wrong() -> None:
    one = np.zeros((1, 3))
    with pytest.raises(SpecificationError, match="no metric 'mae'"):
        causal_effect_strength(one, one, metric="mae")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="logit_diff needs answers"):
        causal_effect_strength(one, one, metric="logit_diff")
    with pytest.raises(SpecificationError, match="recovered needs the corrupt output"):
        causal_effect_strength(one, one, metric="recovered", answers=(0, 1))
    with pytest.raises(DataError, match="same logit difference"):
        causal_effect_strength(one, one, metric="recovered", answers=(0, 1), corrupt=one)
    with pytest.raises(DimensionError, match=r"\(1, 3\) and \(1, 4\) logits"):
        causal_effect_strength(one, np.zeros((1, 4)))
    with pytest.raises(DimensionError, match="has no logits"):
        causal_effect_strength({"last_hidden_state": one}, one)
