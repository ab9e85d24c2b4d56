"""Gradient x attention relevancy: by hand, as its authors' rule on eager attention, and where it must be."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from one_patch import bright_sample, one_patch
from tiny_models import llava, samples
from unchanged import unchanged
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import attention_relevancy
from mechanistic.capture import LoadedModel, Shapes, load_model
from mechanistic.capture.targeted_sample import TargetedSample, target_sample
from mechanistic.store.errors import CaptureError, ModelError, SpecificationError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

WRITES = [name for name in ZOO if name not in ("vit", "dinov2", "clip", "siglip", "blip_matching", "bert")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


def test_attention_relevancy__by_hand() -> None:
    # One of four heads: A = 1 / T, dF / dA = 2 * brightness; on the diagonal the 1 of I besides.
    sample, brightness = bright_sample()
    model = one_patch()
    total = len(target_sample(model, sample, 0, None).tokens["position"])
    found = attention_relevancy(model, sample, target=("left", "right"))
    expected = np.zeros(total)
    expected[found["patch_row"].values >= 0] = np.maximum(0, 2 * brightness) / total / 4
    expected[-1] = 1
    np.testing.assert_allclose(found["attention_relevancy"], expected, rtol=0, atol=1e-7)


def test_attention_relevancy__names_the_one_patch_that_matters() -> None:
    sample, _ = bright_sample()
    found = attention_relevancy(one_patch(marked=42, sharpness=40.0), sample)
    image = found["attention_relevancy"].values[found["kind"].values == 1]
    assert image.argmax() == 42
    assert image[42] / image.sum() > 0.999


def authors(asked: TargetedSample) -> NDArray[Any]:
    """R (query, key) by the rule for self-attention of Chefer et al., from the library's eager attention."""
    model = asked.loaded.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    # BLIP returns its encoder's attention; that of its decoder is seen as its modules give it.
    own = [module for module in model.modules() if type(module).__name__ == "BlipTextSelfAttention"]
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _, args, output: seen.append(output[1])) for module in own]
    try:
        output = model(**asked.inputs, output_attentions=True, use_cache=False)
        attentions = seen or getattr(output, "language_model_outputs", output).attentions
        logits = output.logits[:, int(asked.batch.last_prompt[0])]
        gradients = torch.autograd.grad(asked.target.of(logits)[0], attentions)
    finally:
        for handle in handles:
            handle.remove()
        if before != "eager":
            model.set_attn_implementation(before)
    width = attentions[0].shape[-1]
    others = next((each.shape[-1] for each in attentions if each.shape[-1] != width), 0)
    relevancy = torch.eye(width + others)
    for attention, gradient in zip(attentions, gradients, strict=True):
        mean = torch.zeros(relevancy.shape)
        keys = slice(width) if attention.shape[-1] == width else slice(width, None)
        mean[:width, keys] = (gradient * attention).clamp(min=0).mean(1)[0]
        relevancy = relevancy + mean @ relevancy
    return np.asarray(relevancy[:width].detach())


@pytest.mark.parametrize("name", WRITES)
def test_attention_relevancy__is_its_authors_rule_in_every_family(name: str) -> None:
    family = ZOO[name]
    model, sample = family.build(), zoo_samples(family)[1]
    expected = authors(target_sample(model, sample, 0, None))
    found = attention_relevancy(model, sample)
    np.testing.assert_allclose(found["attention_relevancy"], expected[-1], rtol=0, atol=1e-5)
    words = attention_relevancy(model, sample, rows="words")
    within = words["in_word"].values
    for word in ("red", "circle"):
        rows = expected[np.flatnonzero(within == word)].mean(0)
        np.testing.assert_allclose(words["attention_relevancy"].sel(word=word), rows, rtol=0, atol=1e-5)
    assert len(found["patch_row"]) == expected.shape[1]
    if family.sees:
        image = found.isel(token=found["kind"].values == 1)
        assert (image["attention_relevancy"] > 0).any()
        assert np.isfinite(image["box_x0"]).any() != family.placeless


def test_attention_relevancy__of_some_layers(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        whole = attention_relevancy(loaded, sample)
    finally:
        model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(
        attention_relevancy(loaded, sample, layer=[0, 1, 2])["attention_relevancy"],
        whole["attention_relevancy"],
        rtol=0,
        atol=1e-6,
    )
    top = attention_relevancy(loaded, sample, layer=[2])["attention_relevancy"].values
    assert (top <= whole["attention_relevancy"].values + 1e-6).all()


def test_attention_relevancy__of_spatial_tiny_is_on_the_objects() -> None:
    scenes = Shapes(8)
    found = attention_relevancy(load_model("spatial-tiny"), scenes)
    shares = []
    for number, scene in enumerate(scenes):
        mine = found.isel(token=(found["sample_index"].values == number) & (found["kind"].values == 1))
        values = mine["attention_relevancy"].values
        inside = np.zeros(len(values), bool)
        for role in ("subject", "object"):
            x0, y0, x1, y1 = (float(scene.extra[f"{role}_{edge}"]) for edge in ("x0", "y0", "x1", "y1"))
            across = (mine["box_x0"] < x1) & (mine["box_x1"] > x0)
            inside |= (across & (mine["box_y0"] < y1) & (mine["box_y1"] > y0)).values
        shares.append(values[inside].mean() / values[~inside].mean())
    assert np.median(shares) > 4


def test_attention_relevancy__leaves_the_model_as_it_was(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    with unchanged(loaded, sample):
        attention_relevancy(loaded, sample)
    broken = mock.patch("torch.autograd.grad", side_effect=RuntimeError("broken"))
    with unchanged(loaded, sample), broken, pytest.raises(RuntimeError, match="broken"):
        attention_relevancy(loaded, sample)


def test_attention_relevancy__says_what_is_wrong(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    with pytest.raises(SpecificationError, match=r"no layer 3, 9.\n  Its layers are 0 to 2"):
        attention_relevancy(loaded, sample, layer=[9, 3])
    with pytest.raises(SpecificationError, match="no rows 'first'"):
        attention_relevancy(loaded, sample, rows="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="words of 2 samples"):
        attention_relevancy(loaded, samples(2), rows="words")
    with pytest.raises(CaptureError, match=r"CLIPModel has no decoder .*\n  Choose gradcam"):
        attention_relevancy(ZOO["clip"].build(), zoo_samples(ZOO["clip"])[0])
    with pytest.raises(ModelError, match="does not write on"):
        attention_relevancy(ZOO["bert"].build(), zoo_samples(ZOO["bert"])[0])
