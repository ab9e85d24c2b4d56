"""Integrated gradients: by hand, complete, as captum on plain forwards, and on what is known to matter."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from one_patch import GRID, bright_sample, one_patch
from tiny_models import llava, picture, samples
from unchanged import unchanged
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import integrated_gradients
from mechanistic.capture import LoadedModel, Sample, Shapes, load_model
from mechanistic.capture.pixel_canvases import canvases_of
from mechanistic.capture.targeted_sample import target_sample
from mechanistic.capture.train_architecture import PAD, VOCABULARY
from mechanistic.store.errors import CaptureError, ModelError, SpecificationError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SEES = [name for name, family in ZOO.items() if family.sees and name not in ("vit", "dinov2")]
WRITES = [name for name in ZOO if name not in ("vit", "dinov2", "clip", "siglip", "blip_matching", "bert")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.mark.parametrize("to", ["pixels", "image_embeddings"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients__by_hand(to: Any, baseline: Any) -> None:
    # F is linear in the brightness b of each patch: 2 / T * (b - baseline), whatever the path.
    sample, brightness = bright_sample()
    found = integrated_gradients(one_patch(), sample, to=to, baseline=baseline, steps=3)
    start = 0.0 if baseline == "zero" else brightness.mean()
    total = len(target_sample(one_patch(), sample, 0, None).tokens["position"])
    sign = 1 if found.target == "left - right" else -1
    here = found.isel({found["integrated_gradients"].dims[0]: found["patch_row"].values >= 0})
    expected = sign * 2 / total * (brightness - start)
    np.testing.assert_allclose(here["integrated_gradients"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(here["patch_row"] * GRID + here["patch_col"], np.arange(GRID**2))
    np.testing.assert_allclose(found["score"], sign * 2 / total * brightness.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["completeness_gap"], 0, atol=1e-6)


@pytest.mark.parametrize(("to", "share"), [("pixels", 0.999), ("image_embeddings", 0.9)])
def test_integrated_gradients__names_the_one_patch_that_matters(to: Any, share: float) -> None:
    sample, _ = bright_sample()
    found = integrated_gradients(one_patch(marked=42, sharpness=40.0), sample, to=to, baseline="zero")
    values = found.isel({found["integrated_gradients"].dims[0]: found["patch_row"].values >= 0})
    size = np.abs(values["integrated_gradients"].values)
    assert size.argmax() == 42
    assert size[42] / size.sum() > share


def test_integrated_gradients__to_pixels_is_captum_on_a_plain_forward(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    inputs = target_sample(loaded, sample, 0, None).inputs
    left, right = VOCABULARY["left"], VOCABULARY["right"]

    def difference(pixels: torch.Tensor) -> torch.Tensor:
        rest = {name: inputs[name].repeat(len(pixels), 1) for name in ("input_ids", "attention_mask")}
        logits = loaded.model(pixel_values=pixels, **rest).logits[:, -1]
        return logits[:, left] - logits[:, right]  # type: ignore[no-any-return]

    reference = IntegratedGradients(difference).attribute(
        inputs["pixel_values"], inputs["pixel_values"] * 0, n_steps=6, internal_batch_size=6
    )
    found = integrated_gradients(
        loaded, sample, to="pixels", baseline="zero", target=("left", "right"), steps=6, internal_batch_size=4
    )
    expected = reference[0].sum(0).detach().numpy()
    np.testing.assert_allclose(found["pixel_attribution"][0], expected, rtol=0, atol=1e-5)
    patches = found.isel(patch=found["patch_row"].values >= 0)
    cells = expected.reshape(8, 8, 8, 8).sum((1, 3)).reshape(-1)
    np.testing.assert_allclose(patches["integrated_gradients"], cells, rtol=0, atol=1e-5)
    # The class token is of no pixels.
    assert found["integrated_gradients"].values[0] == 0


def test_integrated_gradients__to_image_embeddings_is_captum_on_given_embeddings(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    inputs = target_sample(loaded, sample, 0, None).inputs
    image = inputs["input_ids"][0] == loaded.anatomy.image_token_id
    with torch.no_grad():
        words = loaded.model.get_input_embeddings()(inputs["input_ids"])
        features = loaded.model.get_image_features(inputs["pixel_values"]).pooler_output[0]

    def chosen(embeddings: torch.Tensor) -> torch.Tensor:
        whole = words.repeat(len(embeddings), 1, 1)
        whole[:, image] = embeddings
        return loaded.model(inputs_embeds=whole).logits[:, -1, VOCABULARY["below"]]  # type: ignore[no-any-return]

    reference = IntegratedGradients(chosen).attribute(
        features[None], features.mean(0).expand(features.shape)[None], n_steps=8, internal_batch_size=8
    )
    found = integrated_gradients(loaded, sample, to="image_embeddings", target="below", steps=8)
    expected = reference[0].sum(-1).detach().numpy()
    np.testing.assert_allclose(found["integrated_gradients"], expected, rtol=0, atol=1e-5)
    assert found["target"].item() == "below"


def test_integrated_gradients__to_words_is_captum_on_the_embedding_layer() -> None:
    loaded = ZOO["qwen2"].build()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[PAD] = 0
    sample = zoo_samples(ZOO["qwen2"])[0]
    asked = target_sample(loaded, sample, 0, None)
    ids = asked.inputs["input_ids"]
    question = asked.tokens["kind"] == 0
    blank = ids.clone()
    blank[0, torch.from_numpy(question)] = PAD

    def chosen(tokens: torch.Tensor) -> torch.Tensor:
        return loaded.model(input_ids=tokens).logits[:, -1, VOCABULARY["left"]]  # type: ignore[no-any-return]

    layer = LayerIntegratedGradients(chosen, loaded.model.get_input_embeddings())
    reference = layer.attribute(ids, blank, n_steps=8, internal_batch_size=8)
    found = integrated_gradients(
        loaded, sample, to="token_embeddings", baseline="zero", target="left", steps=8
    )
    expected = reference[0].sum(-1).detach().numpy()
    np.testing.assert_allclose(found["integrated_gradients"], expected[question], rtol=0, atol=1e-5)
    assert found["in_word"].values.tolist()[:4] == ["where", "is", "the", "red"]


def test_integrated_gradients__to_what_mllama_reads_across_is_captum_on_given_states() -> None:
    family = ZOO["mllama"]
    loaded, sample = family.build(), zoo_samples(family)[1]
    inputs = target_sample(loaded, sample, 0, None).inputs
    left, right = VOCABULARY["left"], VOCABULARY["right"]
    parts = loaded.model.model
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    with torch.no_grad():
        seen = parts.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
        states = parts.multi_modal_projector(seen).flatten(0, 2)

    def difference(states: torch.Tensor) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "cross_attention_mask")
        rest = {name: inputs[name].repeat_interleave(len(states), 0) for name in names}
        logits = loaded.model(cross_attention_states=states.flatten(0, 1), **rest).logits[:, -1]
        return logits[:, left] - logits[:, right]  # type: ignore[no-any-return]

    reference = IntegratedGradients(difference).attribute(states[None], states[None] * 0, n_steps=6)
    found = integrated_gradients(loaded, sample, baseline="zero", target=("left", "right"), steps=6)
    expected = reference[0].flatten(0, 1).sum(-1).detach().numpy()
    np.testing.assert_allclose(found["integrated_gradients"], expected, rtol=0, atol=1e-5)
    # Class tokens and empty tiles are no patches, and stay as they are where the baseline is the mean.
    mean = integrated_gradients(loaded, sample, steps=2)
    assert not mean["integrated_gradients"].values[mean["patch_row"].values < 0].any()


@pytest.mark.parametrize("name", sorted({*SEES, *WRITES}))
def test_integrated_gradients__is_complete_in_every_family(name: str) -> None:
    family = ZOO[name]
    loaded = family.build()
    sample = zoo_samples(family)[0 if name in ("clip", "siglip") else 1]
    if name in WRITES:
        inputs = target_sample(loaded, sample, 0, None).inputs
        with torch.no_grad():
            logits = loaded.model(**inputs).logits[0, -1]
        answers = logits[[VOCABULARY["left"], VOCABULARY["right"]]]
        expected = float((answers[0] - answers[1]).abs())
        words = integrated_gradients(loaded, sample, to="token_embeddings", steps=4)
        np.testing.assert_allclose(words["score"], expected, rtol=1e-5)
        total = words["integrated_gradients"].sum() - (words["score"] - words["baseline_score"])
        np.testing.assert_allclose(words["completeness_gap"], total, rtol=0, atol=1e-5)
    for to in ("pixels", "image_embeddings") if name in SEES else ():
        if to == "image_embeddings" and name not in WRITES:
            continue
        placed = to == "pixels" or not family.placeless
        baseline = "blurred" if placed else "mean"
        found = integrated_gradients(loaded, sample, to=to, baseline=baseline, steps=24)  # type: ignore[arg-type]
        np.testing.assert_allclose(found["completeness_gap"], 0, atol=2e-4)
        assert (found["integrated_gradients"] != 0).any()
        here = found["image_index"].values >= 0
        assert set(found["image_index"].values[here]) == set(range(len(sample.images)))
        assert (found["patch_row"].values[here] >= 0).any() == placed


@pytest.mark.parametrize("name", SEES)
def test_integrated_gradients__pixels_are_pictures_again(name: str) -> None:
    family = ZOO[name]
    sample = zoo_samples(family)[0 if name in ("clip", "siglip") else 1]
    asked = target_sample(family.build(), sample, 0, None)
    values, canvases = asked.inputs["pixel_values"], canvases_of(asked)
    same = canvases.replaced(values, lambda canvas: canvas)
    torch.testing.assert_close(same, values.float(), rtol=0, atol=1e-6)
    patch = canvases.patch
    maps = [
        np.kron(np.arange(9999, dtype=np.float32)[: h // patch * (w // patch)].reshape(h // patch, -1), one)
        for _, h, w in (each.shape for each in canvases.split(values))
        for one in [np.ones((patch, patch), np.float32)]
    ]
    sums = canvases.patch_sums(maps, asked.patches) / patch**2
    row, column = asked.patches["patch_row"], asked.patches["patch_col"]
    for place, each in zip(canvases.places, maps, strict=True):
        here = (asked.patches["image_index"] == place[0]) & (asked.patches["tile"] == place[1]) & (row >= 0)
        np.testing.assert_array_equal(sums[here], (row * (each.shape[1] // patch) + column)[here])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_integrated_gradients__qwens_patches_are_the_picture(name: str) -> None:
    image = picture(3, 48, 32)
    sample = Sample(sample_id="one", images=(image,), question="where is the red square ?")
    asked = target_sample(ZOO[name].build(), sample, 0, None)
    canvases = canvases_of(asked)
    [canvas] = canvases.split(asked.inputs["pixel_values"])
    expected = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(canvas / canvases.frames, expected.transpose(2, 0, 1), rtol=0, atol=1e-5)


def test_integrated_gradients__does_not_depend_on_batches_or_company(loaded: LoadedModel) -> None:
    given = samples(2)
    together = integrated_gradients(loaded, given, steps=5, internal_batch_size=5)
    alone = integrated_gradients(loaded, given[1], steps=5, internal_batch_size=1)
    mine = together["integrated_gradients"].values[together["sample_index"].values == 1]
    np.testing.assert_allclose(mine, alone["integrated_gradients"], rtol=0, atol=1e-5)
    assert together["sample_id"].values.tolist() == ["s000", "s001"]
    assert together.attrs["steps"] == 5
    assert together.attrs["model"] == "random-llava-0"


def test_integrated_gradients__takes_a_plain_model_and_a_picture(loaded: LoadedModel) -> None:
    image, text = picture(1), "where is the red square ?"
    found = integrated_gradients(loaded.model, (image, text), processor=loaded.processor, steps=2)
    sample = Sample(sample_id="x", images=(image,), question=text)
    expected = integrated_gradients(loaded, [sample], steps=2)
    np.testing.assert_array_equal(found["integrated_gradients"], expected["integrated_gradients"])
    with pytest.raises(UsageError, match="processor=processor"):
        integrated_gradients(loaded.model, (image, text))


@pytest.mark.parametrize("to", ["pixels", "image_embeddings", "token_embeddings"])
def test_integrated_gradients__leaves_the_model_as_it_was(loaded: LoadedModel, to: Any) -> None:
    sample = samples(1)[0]
    with unchanged(loaded, sample):
        integrated_gradients(loaded, sample, to=to, steps=2)
    broken = mock.patch.object(IntegratedGradients, "attribute", side_effect=RuntimeError("broken"))
    with unchanged(loaded, sample), broken, pytest.raises(RuntimeError, match="broken"):
        integrated_gradients(loaded, sample, to=to, steps=2)
    # Two forwards look at the model as it is, one asks, one or two prepare: this is in the midst of it.
    left = [5]

    def fail_in_the_end(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("in a forward")

    handle = loaded.model.lm_head.register_forward_hook(fail_in_the_end)
    with unchanged(loaded, sample), pytest.raises(RuntimeError, match="in a forward"):
        integrated_gradients(loaded, sample, to=to, steps=2)
    handle.remove()


def test_integrated_gradients__of_spatial_tiny_is_on_the_objects() -> None:
    scenes = Shapes(4)
    found = integrated_gradients(load_model("spatial-tiny"), scenes, baseline="blurred", steps=12)
    assert (found["completeness_gap_relative"] < 0.02).all()
    for number, scene in enumerate(scenes):
        mine = found.isel(token=found["sample_index"].values == number)
        size = np.abs(mine["integrated_gradients"].values)
        inside = np.zeros(len(size), bool)
        for role in ("subject", "object"):
            x0, y0, x1, y1 = (float(scene.extra[f"{role}_{edge}"]) for edge in ("x0", "y0", "x1", "y1"))
            across = (mine["box_x0"] < x1) & (mine["box_x1"] > x0)
            inside |= (across & (mine["box_y0"] < y1) & (mine["box_y1"] > y0)).values
        assert size[inside].mean() > 10 * size[~inside].mean()


def test_integrated_gradients__says_what_is_wrong(loaded: LoadedModel) -> None:
    sample = samples(1)[0]
    for wrong, match in (
        ({"to": "words"}, r"no to='words'.\n  Choose of pixels"),
        ({"baseline": "black"}, "no baseline 'black'"),
        ({"method": "simpson"}, "no method='simpson'"),
        ({"steps": 0}, "steps=0"),
        ({"blur": 0.0}, "blur=0.0"),
        ({"to": "token_embeddings", "baseline": "blurred"}, "Words cannot be blurred"),
        ({"target": "leftmost"}, "cannot be told apart by one token"),
        ({"target": ("left", "left")}, "cannot be told apart"),
        ({"target": (3, 3)}, "is always 0"),
        ({"target": 10**6}, "There is no logit 1000000"),
        ({"target": "red square"}, "splits 'red square' into 2 tokens"),
    ):
        with pytest.raises(SpecificationError, match=match):
            integrated_gradients(loaded, sample, **wrong)  # type: ignore[arg-type]
    blind = Sample(sample_id="blind", images=(), question="where is the red square ?")
    with pytest.raises(CaptureError, match="no image tokens among the words"):
        integrated_gradients(loaded, blind)
    with pytest.raises(CaptureError, match="no pixels to attribute to"):
        integrated_gradients(loaded, blind, to="pixels")
    with pytest.raises(UsageError, match="no question to ask a model: int"):
        integrated_gradients(loaded, 3)
    loaded.model.train()
    try:
        with pytest.raises(UsageError, match="training mode"):
            integrated_gradients(loaded, sample)
    finally:
        loaded.model.eval()


def test_integrated_gradients__refuses_what_it_cannot_reach() -> None:
    clip = ZOO["clip"].build()
    sample = zoo_samples(ZOO["clip"])[0]
    with pytest.raises(CaptureError, match=r"no decoder .*\n  Choose to='pixels'"):
        integrated_gradients(clip, sample)
    with pytest.raises(ModelError, match="how well text and image fit"):
        integrated_gradients(clip, sample, to="pixels", target="left")
    with pytest.raises(CaptureError, match="2 images for 1 text"):
        integrated_gradients(clip, zoo_samples(ZOO["clip"])[1], to="pixels")
    with pytest.raises(ModelError, match="gives no logits"):
        integrated_gradients(ZOO["vit"].build(), sample, to="pixels")
    with pytest.raises(ModelError, match="does not write on"):
        integrated_gradients(ZOO["bert"].build(), zoo_samples(ZOO["bert"])[0])
    with pytest.raises(SpecificationError, match="tile of zeros for padding"):
        integrated_gradients(ZOO["idefics3"].build(), sample, to="pixels", baseline="zero")
