"""Ablation: by hand, against plain hooks, what was planted, and what does not correspond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hand_built import AT_COLOUR, ONLY, one_head, pairs
from tiny_models import llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import ablate
from mechanistic.analysis.ablation import _donors
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.mark.parametrize("method", ["mean", "zero", "resample"])
def test_ablate__names_the_planted_head(method: str) -> None:
    got = ablate(pairs(2), one_head(), method=method, quiet=True)
    effect = got.mean_effect.copy()
    assert abs(float(effect[ONLY])) > 3.9
    effect[ONLY] = 0
    assert float(np.abs(effect).max()) < 0.01
    assert float(got.clean_accuracy) == 1
    assert int(got.broken[ONLY]) == 2
    assert int(got.broken.sum()) == 2
    assert int(got.repaired.sum()) == 0


def test_ablate__mean_and_zero_of_the_planted_head_by_hand() -> None:
    # The mean of red and green is neither: both answers get the same.
    mean = ablate(pairs(1), one_head(), method="mean", layers=ONLY[0], heads=ONLY[1], quiet=True)
    np.testing.assert_allclose(mean.ablated[:, 0, 0], 0, atol=0.01)
    # With resampling each of the two gets the other's: the answers change places.
    swap = ablate(pairs(1), one_head(), method="resample", layers=ONLY[0], heads=ONLY[1], quiet=True)
    np.testing.assert_allclose(swap.ablated[:, 0, 0], -swap.clean, atol=0.01)
    np.testing.assert_array_equal(swap.choice[:, 0, 0], [1, 0])


def test_ablate__acts_at_the_place_alone() -> None:
    here = ablate(pairs(1), one_head(), site="resid_post", place=AT_COLOUR, method="mean", quiet=True)
    np.testing.assert_allclose(here.mean_effect, [-4, 0, 0], atol=0.02)
    there = ablate(pairs(1), one_head(), site="resid_post", place=AT_COLOUR - 1, method="mean", quiet=True)
    np.testing.assert_allclose(there.mean_effect, 0, atol=0.02)


@pytest.mark.parametrize("method", ["mean", "zero", "resample"])
def test_ablate__is_what_plain_hooks_compute(method: str) -> None:
    model = llava()
    data = [samples(8)[0], samples(8)[4]]
    got = ablate(data, model, site="mlp_out", method=method, batch_size=1, metric="prob", quiet=True)
    layers = model.model.model.language_model.layers
    batches = [
        prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
        for sample in data
    ]
    for layer in range(3):
        outputs: list[torch.Tensor] = []
        mlp = layers[layer].mlp
        handle = mlp.register_forward_hook(lambda _, args, output, seen=outputs: seen.append(output))
        with torch.no_grad():
            for batch in batches:
                model.model(**to_device(batch.inputs, model.model))
        handle.remove()
        new = {
            "zero": [torch.zeros_like(each) for each in outputs],
            "mean": [(outputs[0] + outputs[1]) / 2] * 2,
            "resample": outputs[::-1],
        }[method]
        for row, (batch, sample) in enumerate(zip(batches, data, strict=True)):
            handle = mlp.register_forward_hook(lambda _, args, output, value=new[row]: value)
            with torch.no_grad():
                logits = model.model(**to_device(batch.inputs, model.model)).logits[0, -1]
            handle.remove()
            answer = model.tokenizer.convert_tokens_to_ids(sample.answer)
            expected = float(logits.softmax(-1)[answer])
            assert float(got.ablated[row, layer]) == pytest.approx(expected, abs=1e-6)


def test_ablate__resampling_takes_from_every_sample_once_and_never_from_itself() -> None:
    for size in (2, 3, 17):
        donors = _donors(size, seed=1)
        assert sorted(donors) == list(range(size))
        assert (donors != np.arange(size)).all()


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "gemma3", "llava"])
def test_ablate__works_on_every_kind_of_decoder(name: str) -> None:
    family = ZOO[name]
    model, data = family.build(), zoo_samples(family)[:2]
    heads = ablate(data, model, place="last", method="mean", layers=[1], quiet=True)
    assert heads.effect.dims == ("sample", "layer", "head")
    assert heads.layer.values.tolist() == [1]
    assert float(np.abs(heads.effect).max()) > 0
    whole = ablate(data, model, site="attn_out", method="zero", batch_size=1, quiet=True)
    together = ablate(data, model, site="attn_out", method="zero", batch_size=2, quiet=True)
    np.testing.assert_allclose(whole.ablated, together.ablated, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "gemma3", "llava", "internvl"])
def test_ablate__silences_heads_of_the_image_encoder(name: str) -> None:
    family = ZOO[name]
    model, data = family.build(), zoo_samples(family)[:2]
    how: dict[str, Any] = {"stack": "vision", "method": "zero", "quiet": True}
    heads = ablate(data, model, **how)
    vision = model.anatomy.stack("vision")
    assert heads.effect.shape == (2, len(vision.layers), vision.heads)
    assert float(np.abs(heads.effect).min(["sample"]).max()) > 0
    # A head that says nothing is one whose columns of the output projection are zero.
    layer = vision.layers[0]
    projection = next(
        module
        for path, module in layer.named_modules()
        if path.split(".")[-1] in ("out_proj", "proj", "projection_layer", "o_proj") and "mlp" not in path
    )
    with torch.no_grad():
        projection.weight[:, vision.head_width : 2 * vision.head_width] = 0
    by_hand = ablate(data, model, site="mlp_out", layers=[0], method="zero", quiet=True)
    np.testing.assert_allclose(by_hand.clean, heads.ablated.sel(layer=0, head=1), atol=1e-5)


def test_ablate__refuses_what_does_not_correspond() -> None:
    model, data = llava(), samples(2)
    kwargs: dict[str, Any] = {"quiet": True}
    with pytest.raises(DataError, match=r"tokens at 'all', others \d+: they do not correspond"):
        ablate(data, model, method="mean", **kwargs)
    with pytest.raises(DataError, match="they do not correspond"):
        ablate(data, model, method="resample", **kwargs)
    with pytest.raises(DataError, match="There is one sample only"):
        ablate(data[:1], model, **kwargs)
    with pytest.raises(SpecificationError, match="no ablation of 'q' by 'mean'"):
        ablate(data, model, site="q", **kwargs)
    with pytest.raises(SpecificationError, match="'mlp_out' has no heads"):
        ablate(data, model, site="mlp_out", heads=[0], **kwargs)
    with pytest.raises(SpecificationError, match="no head 4; the decoder has 4"):
        ablate(data, model, heads=[4], **kwargs)
    with pytest.raises(SpecificationError, match="no head 3; the vision stack has 3"):
        ablate(data, model, stack="vision", method="zero", heads=3, **kwargs)
    with pytest.raises(SpecificationError, match="no stack 'ears' to change"):
        ablate(data, model, stack="ears", **kwargs)
    with pytest.raises(SpecificationError, match="batch_size is 0"):
        ablate(data, model, method="zero", batch_size=0, **kwargs)
