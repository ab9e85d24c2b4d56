"""Knock-out and scaling of attention: equal to editing the mask by hand, and what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hand_built import AT_COLOUR, AT_LAST, AT_SQUARE, FIRST, ONLY, SECOND, one_head, pairs, two_steps
from tiny_models import llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import ablate, adapt_scale, attention_knockout, scale_attention
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def test_attention_knockout__is_the_mask_edited_by_hand() -> None:
    model, data = llava(), samples(3)
    got = attention_knockout(
        data, model, edges=[("last", "image"), ("object", "subject")], window=2, metric="prob", quiet=True
    )
    batches = [
        prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
        for sample in data
    ]
    model.model.set_attn_implementation("eager")
    layers = model.model.model.language_model.layers
    for row, (batch, sample) in enumerate(zip(batches, data, strict=True)):
        labels, answer = batch.decoder[0], model.tokenizer.convert_tokens_to_ids(sample.answer)
        sides = {
            "last -> image": (labels["is_last_prompt"], labels["kind"] == 1),
            "object -> subject": (labels["is_object"], labels["is_subject"]),
        }
        for edge, (query, key) in sides.items():
            closed = torch.from_numpy(query[:, None] & key[None, :])

            def edit(_: Any, args: Any, kwargs: Any, closed: torch.Tensor = closed) -> Any:
                mask = kwargs["attention_mask"]
                return args, {
                    **kwargs,
                    "attention_mask": mask.masked_fill(closed, torch.finfo(mask.dtype).min),
                }

            for layer in range(3):
                handles = [
                    layers[number].self_attn.register_forward_pre_hook(edit, with_kwargs=True)
                    for number in range(max(0, layer - 1), layer + 1)
                ]
                with torch.no_grad():
                    logits = model.model(**to_device(batch.inputs, model.model)).logits[0, -1]
                for handle in handles:
                    handle.remove()
                mine = got.knocked_out.sel(edge=edge, layer=layer)[row]
                assert float(mine) == pytest.approx(float(logits.softmax(-1)[answer]), abs=1e-6)


def test_attention_knockout__names_the_planted_looks() -> None:
    edges = [(AT_LAST, AT_COLOUR), (AT_LAST, AT_SQUARE), (AT_SQUARE, AT_COLOUR)]
    one = attention_knockout(pairs(2), one_head(), edges=edges, per_head=True, quiet=True)
    strong = np.argwhere(np.abs(one.mean_effect.values) > 0.05)
    assert strong.tolist() == [[0, *ONLY]]
    assert one.edge.values[0] == "@10 -> @4"
    assert int(one.broken.sum()) == 2
    two = attention_knockout(pairs(2), two_steps("v"), edges=edges, per_head=True, quiet=True)
    strong = np.argwhere(np.abs(two.mean_effect.values) > 0.05)
    assert strong.tolist() == [[1, *SECOND], [2, *FIRST]]
    together = attention_knockout(pairs(2), two_steps("v"), edges=edges, window=9, quiet=True)
    assert (np.abs(together.mean_effect.values) > 0.05).tolist() == [[False] * 3, [True] * 3, [True] * 3]


def test_attention_knockout__a_query_without_a_key_attends_to_nothing() -> None:
    model, data = llava(), samples(2)
    cut = attention_knockout(data, model, edges=[("last", "all")], per_head=True, quiet=True)
    silent = ablate(data, model, place="last", method="zero", quiet=True)
    np.testing.assert_allclose(cut.knocked_out.isel(edge=0), silent.ablated, atol=1e-5)


def test_scale_attention__by_one_changes_nothing_and_is_the_formula_by_hand() -> None:
    model, data = llava(), samples(2)
    got = scale_attention(data, model, factors=[0.0, 1.0, 1.7], layers=[1], metric="prob", quiet=True)
    np.testing.assert_allclose(got.scaled.sel(factor=1.0), got.clean, atol=1e-6)
    model.model.set_attn_implementation("eager")
    attention = model.model.model.language_model.layers[1].self_attn
    module = __import__("sys").modules[type(attention).__module__]
    own = module.eager_attention_forward
    for row, sample in enumerate(data):
        batch = prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
        image = torch.from_numpy(batch.decoder[0]["kind"] == 1)

        def scaled(
            self: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self is not attention:
                return own(self, query, key, value, mask, scaling=scaling, **rest)  # type: ignore[no-any-return]
            scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scaling
            scores[:, :, -1, image] *= 1.7  # noqa: B023
            weights = (scores + mask).softmax(-1)
            return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2).contiguous(), weights

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(module, "eager_attention_forward", scaled)
            logits = model.model(**to_device(batch.inputs, model.model)).logits[0, -1]
        answer = model.tokenizer.convert_tokens_to_ids(sample.answer)
        expected = float(logits.softmax(-1)[answer])
        assert float(got.scaled.sel(factor=1.7)[row]) == pytest.approx(expected, abs=1e-6)
        assert float(got.clean[row]) != pytest.approx(expected, abs=1e-5)


def test_adapt_scale__chooses_a_factor_by_confidence() -> None:
    got = scale_attention(samples(6), llava(), factors=[0.2, 3.0], quiet=True)
    threshold = float(np.median(got.confidence))
    adapted = adapt_scale(got, unsure=0.2, sure=3.0, threshold=threshold)
    for row in range(6):
        factor = 0.2 if float(got.confidence[row]) < threshold else 3.0
        assert float(adapted.factor[row]) == factor
        assert int(adapted.choice[row]) == int(got.choice.sel(factor=factor)[row])
    right = adapted.choice.values == got.answer_index.values
    assert float(adapted.accuracy) == pytest.approx(right.mean())
    assert int(adapted.repaired - adapted.broken) == right.sum() - round(float(got.clean_accuracy) * 6)
    with pytest.raises(DimensionError, match=r"factor 0\.5 was not measured; there are 0\.2, 3\.0"):
        adapt_scale(got, unsure=0.5, sure=3.0, threshold=0.3)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_attention_knockout__works_on_every_kind_of_decoder_and_leaves_it_as_it_was(name: str) -> None:
    family = ZOO[name]
    model, data = family.build(), zoo_samples(family)[:2]
    batch = prepare_batch(model, data, 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
    with torch.no_grad():
        before = model.model(**to_device(batch.inputs, model.model)).logits
    got = attention_knockout(data, model, edges=[("last", "subject")], heads=[0, 3], quiet=True)
    assert float(np.abs(got.effect).max()) > 0
    scaled = scale_attention(data, model, edge=("last", "subject"), factors=[1.0], quiet=True)
    np.testing.assert_allclose(scaled.effect, 0, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model.model(**to_device(batch.inputs, model.model)).logits, before)


def test_attention_knockout__refuses_what_cannot_be_cut_and_leaves_nothing_behind() -> None:
    model, data = llava(), samples(1)
    batch = prepare_batch(model, data, 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
    with torch.no_grad():
        before = model.model(**to_device(batch.inputs, model.model)).logits
    with pytest.raises(SpecificationError, match="window=0"):
        attention_knockout(data, model, window=0, quiet=True)
    with pytest.raises(SpecificationError, match="no layer 3; the decoder has 3"):
        attention_knockout(data, model, layers=3, quiet=True)
    with pytest.raises(DataError, match="has no token at 'relation'"):
        attention_knockout(data, model, edges=[("last", "relation")], quiet=True)
    with pytest.raises(SpecificationError, match="The factors are"):
        scale_attention(data, model, factors=[-1.0], quiet=True)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model.model(**to_device(batch.inputs, model.model)).logits, before)
