"""Grad-CAM: by hand, as captum's LayerGradCam, on the last layer that is read, every tile by its place."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from numpy.typing import NDArray
from one_patch import GRID, bright_sample, one_patch
from tiny_models import llava, samples
from torch import nn
from unchanged import unchanged
from zoo import ZOO
from zoo import samples as zoo_samples
from zoo_parts import HALF, HUB, clip

from mechanistic.analysis import gradcam
from mechanistic.capture import LoadedModel
from mechanistic.capture.targeted_sample import TargetedSample, target_sample
from mechanistic.store.errors import CaptureError, DataError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


def test_gradcam__by_hand() -> None:
    # dF / dA is 2 / T for the brightness of each patch, and 0 for every other channel.
    sample, brightness = bright_sample()
    model = one_patch()
    total = len(target_sample(model, sample, 0, None).tokens["position"])
    for target, sign in ((("left", "right"), 1), (("right", "left"), -1)):
        found = gradcam(model, sample, target=target)
        expected = sign * 2 / total * brightness
        np.testing.assert_allclose(found["gradcam"], np.maximum(expected, 0), rtol=0, atol=1e-7)
        signed = gradcam(model, sample, target=target, relu=False)
        np.testing.assert_allclose(signed["gradcam"], expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found["patch_row"] * GRID + found["patch_col"], np.arange(GRID**2))
    assert found["layer"].item() == 1


def test_gradcam__names_the_one_patch_that_holds_what_matters() -> None:
    sample, _ = bright_sample(only=42)
    found = gradcam(one_patch(), sample, target=("left", "right"))["gradcam"].values
    assert found.argmax() == 42
    assert found[42] / found.sum() > 0.75
    # Means over patches make the weights: a patch that attention chose, not a channel, is not found.
    chosen, _ = bright_sample()
    spread = gradcam(one_patch(marked=42, sharpness=40.0), chosen)["gradcam"].values
    assert spread[42] < 0.1 * spread.sum()


class Grid(nn.Module):
    """A place in the model whose output is (image, channel, patch), as captum takes it."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches


def captums(asked: TargetedSample, layer: nn.Module, ahead: int) -> NDArray[Any]:
    """captum's LayerGradCam of an encoder layer, its patches put through `Grid`; (image * patch,)."""
    grid = Grid()

    own = layer.forward

    def through(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = own(*args, **kwargs)
        passed = grid(output[:, ahead:].transpose(1, 2)).transpose(1, 2)
        return torch.cat([output[:, :ahead], passed], dim=1)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        # One score a picture, as captum counts examples; of several pictures it is their common one.
        return asked.scores(pixel_values=pixels).expand(len(pixels)) / len(pixels)

    with mock.patch.object(layer, "forward", through):
        cam = LayerGradCam(forward, grid).attribute(asked.inputs["pixel_values"], relu_attributions=True)
    return np.asarray(cam.detach().reshape(-1))


@pytest.mark.parametrize(
    ("name", "path", "ahead"),
    [
        ("llava", "model.vision_tower.encoder.layers.1", 1),
        ("gemma3", "model.vision_tower.encoder.layers.1", 0),
        ("paligemma", "model.vision_tower.encoder.layers.1", 0),
        ("internvl", "model.vision_tower.encoder.layer.1", 1),
        ("clip", "vision_model.encoder.layers.0", 1),
        ("siglip", "vision_model.encoder.layers.1", 0),
    ],
)
def test_gradcam__is_captums(name: str, path: str, ahead: int) -> None:
    family = ZOO[name]
    model = family.build()
    sample = zoo_samples(family)[0 if name in ("clip", "siglip") else 1]
    reference = captums(target_sample(model, sample, 0, None), model.model.get_submodule(path), ahead)
    found = gradcam(model, sample)
    assert reference.any()
    np.testing.assert_allclose(found["gradcam"], reference, rtol=0, atol=1e-6 * reference.max() + 1e-9)
    assert found["layer"].item() == int(path[-1])


def test_gradcam__takes_the_last_layer_that_is_read(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    assert gradcam(loaded, sample)["layer"].item() == 1
    loaded.model.config.vision_feature_layer = -2
    try:
        found = gradcam(loaded, sample)
        assert found["layer"].item() == 0
        np.testing.assert_array_equal(found["gradcam"], gradcam(loaded, sample, layer=0)["gradcam"])
        with pytest.raises(DataError, match=r"not depend on the patches of layer 1.*\n  Leave layer out"):
            gradcam(loaded, sample, layer=1)
    finally:
        loaded.model.config.vision_feature_layer = -1


@pytest.mark.parametrize(
    "name", [name for name, each in ZOO.items() if {"text", "vision"} <= set(each.layers)]
)
def test_gradcam__labels_every_patch_of_every_tile(name: str) -> None:
    family = ZOO[name]
    model, sample = family.build(), zoo_samples(family)[0 if name in ("clip", "siglip") else 1]
    found = gradcam(model, sample)
    table = target_sample(model, sample, 0, None).patches
    patches = table["patch_row"] >= 0
    for label in ("image_index", "tile", "patch_row", "patch_col", "box_x0", "box_y1"):
        np.testing.assert_array_equal(found[label], table[label][patches])
    assert (found["gradcam"] >= 0).all()
    places = set(zip(found["image_index"].values.tolist(), found["tile"].values.tolist(), strict=True))
    # Gemma crops a 50 x 30 image in two and a 30 x 100 one in three, beside the whole of each.
    tiles = {"llava_next": 6, "internvl": 6, "idefics3": 8, "smolvlm": 8, "mllama": 5, "gemma3_cropping": 7}
    assert len(places) == tiles.get(name, len(sample.images))


def test_gradcam__of_the_second_encoder_of_mllama() -> None:
    family = ZOO["mllama"]
    model, sample = family.build(), zoo_samples(family)[1]
    found = gradcam(model, sample, stack="vision_global", relu=False)
    assert found["layer"].item() == 0
    assert found["gradcam"].values.any()
    np.testing.assert_array_equal(found["tile"], gradcam(model, sample)["tile"])


def test_gradcam__of_a_classifier_takes_a_class() -> None:
    config = HUB.ViTConfig(**clip(num_labels=3, id2label={0: "cup", 1: "cat", 2: "car"}, model_type="vit"))
    torch.manual_seed(0)
    model = HUB.ViTForImageClassification(config).eval()
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    sample = zoo_samples(ZOO["vit"])[0]
    found = gradcam(model, sample, target="cat", processor=processor)
    with torch.no_grad():
        expected = model(**processor(images=list(sample.images), return_tensors="pt")).logits[0, 1]
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5)
    # Of its last layer the head reads the class token alone.
    assert found["layer"].item() == 0
    with pytest.raises(SpecificationError, match=r"no class dog.\n  It has: cup, cat, car"):
        gradcam(model, sample, target="dog", processor=processor)


def test_gradcam__leaves_the_model_as_it_was(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    with unchanged(loaded, sample):
        gradcam(loaded, sample)
    broken = mock.patch("torch.autograd.grad", side_effect=RuntimeError("broken"))
    with unchanged(loaded, sample), broken, pytest.raises(RuntimeError, match="broken"):
        gradcam(loaded, sample)
    with unchanged(loaded, sample), pytest.raises(SpecificationError, match=r"layers are 0 to 1"):
        gradcam(loaded, sample, layer=7)


def test_gradcam__says_what_is_wrong(loaded: LoadedModel) -> None:
    with pytest.raises(SpecificationError, match="'text' does not encode images"):
        gradcam(loaded, samples(1)[0], stack="text")
    with pytest.raises(CaptureError, match="no image encoder"):
        gradcam(ZOO["llama"].build(), zoo_samples(ZOO["llama"])[0])
    blank = llava()
    with torch.no_grad():
        blank.model.lm_head.weight.zero_()
    with pytest.raises(DataError, match="patches of any layer"):
        gradcam(blank, samples(1)[0])
