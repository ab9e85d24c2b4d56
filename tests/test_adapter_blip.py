"""BLIP's own attention code under the tap: seen as it is, edited as asked, left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Listed
from torch import Tensor, nn
from zoo import ZOO, samples
from zoo_parts import HUB, grown

from mechanistic.capture.attention_editor import Editor
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.tap import AttentionCall, tapped
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import ModelError


class QueryEditor(Editor):
    """Doubles the queries of some modules; the formula is asked for where `by_formula`."""

    def __init__(self, *, factor: float, by_formula: bool = False) -> None:
        self.factor = factor
        self.by_formula = by_formula

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return query * self.factor if self.factor != 1 else query, key, value, mask

    def edits_weights(self, module: nn.Module) -> bool:
        return self.by_formula


@pytest.fixture
def loaded() -> LoadedModel:
    return ZOO["blip"].build()


@pytest.fixture
def batch(loaded: LoadedModel) -> Batch:
    """Four questions of different lengths, with answers."""
    texts = TokenTexts(loaded.tokenizer)
    return prepare_batch(loaded, samples(ZOO["blip"]), 0, max_new_tokens=2, texts=texts)


def logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(**batch.inputs).logits
    return found[batch.inputs["attention_mask"].bool()]


def hooks(model: Any) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


def test_blip__a_site_inside_its_layers_is_refused_before_there_is_a_folder(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"'text\.\*\.attn_out' is not defined in this model"):
        capture_run(
            loaded, Listed(samples(ZOO["blip"])), tmp_path / "run", sites=["text.*.attn_out"], quiet=True
        )
    assert not list(tmp_path.iterdir())


def test_blip__the_tap_changes_no_logit_and_leaves_nothing(loaded: LoadedModel, batch: Batch) -> None:
    plain, had = logits(loaded, batch), hooks(loaded.model)
    inner: list[AttentionCall] = []
    outer: list[AttentionCall] = []
    with tapped(loaded.model, outer.append):
        with tapped(loaded.model, inner.append):
            assert torch.equal(logits(loaded, batch), plain)
        assert torch.equal(logits(loaded, batch), plain)
    # Two layers of the encoder, and two of the decoder, which attend twice.
    assert (len(inner), len(outer)) == (6, 12)
    with pytest.raises(RuntimeError, match="observer"), tapped(loaded.model, _fail):
        logits(loaded, batch)
    assert hooks(loaded.model) == had
    assert torch.equal(logits(loaded, batch), plain)


def _fail(call: AttentionCall) -> None:
    raise RuntimeError("observer")


def test_blip__every_call_of_a_generation_with_its_cache_is_whole(loaded: LoadedModel, batch: Batch) -> None:
    calls: list[AttentionCall] = []
    inputs = {name: value[:1] for name, value in batch.inputs.items()}
    with tapped(loaded.model, calls.append), torch.no_grad():
        loaded.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prompt = inputs["input_ids"].shape[1] - 1
    in_words = [call for call in calls if type(call.module).__name__ == "BlipTextSelfAttention"]
    # Steps of two layers, each of which attends to words and then to the image's class token and 16 patches.
    keys = [(prompt + step, 17) for step in range(3) for _ in range(2)]
    assert [call.key.shape[2] for call in in_words] == [size for pair in keys for size in pair]
    for call in calls:
        mixed = (call.pattern() @ call.value).transpose(1, 2)
        torch.testing.assert_close(mixed, call.output, rtol=0, atol=1e-5)


def test_blip__each_step_of_a_padded_batch_is_that_of_each_sample_alone(loaded: LoadedModel) -> None:
    steps: list[Tensor] = []
    loaded.model.text_decoder.register_forward_hook(lambda _, args, out: steps.append(out.logits[:, -1]))
    asked, texts = samples(ZOO["blip"]), TokenTexts(loaded.tokenizer)
    answers = prepare_batch(loaded, asked, 0, max_new_tokens=3, texts=texts).answers
    together = torch.stack(steps, dim=1)
    assert together.shape[:2] == (4, 3)
    for sample, answer, expected in zip(asked, answers, together, strict=True):
        steps.clear()
        inputs = loaded.processor(text=[sample.question], images=[list(sample.images)], return_tensors="pt")
        prompt = inputs["input_ids"].shape[1] - 1
        alone = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, prompt:].tolist()
        assert answer == alone
        torch.testing.assert_close(torch.cat(steps), expected, rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_blip__edited_queries_act_as_edited_weights_do(loaded: LoadedModel, batch: Batch) -> None:
    plain = logits(loaded, batch)
    with tapped(loaded.model, lambda call: None, QueryEditor(factor=2)):
        edited = logits(loaded, batch)
    with tapped(loaded.model, lambda call: None, QueryEditor(factor=1, by_formula=True)):
        torch.testing.assert_close(logits(loaded, batch), plain, rtol=0, atol=1e-5)
    with torch.no_grad():
        for module in loaded.model.modules():
            if type(module).__name__ == "BlipTextSelfAttention":
                for parameter in module.query.parameters():
                    parameter.mul_(2)
            elif type(module).__name__ == "BlipAttention":
                for parameter in module.qkv.parameters():
                    parameter[: module.embed_dim].mul_(2)
    torch.testing.assert_close(edited, logits(loaded, batch), rtol=0, atol=1e-5)
    assert float((edited - plain).abs().max()) > 1e-3


def test_blip__the_decoder_reads_what_generate_gives_it(loaded: LoadedModel, batch: Batch) -> None:
    words = loaded.model.config.text_config
    for row, columns in enumerate(batch.decoder):
        ids = batch.inputs["input_ids"][row, : len(columns["position"])].tolist()
        assert ids[0] == words.bos_token_id != loaded.tokenizer.bos_token_id
        assert words.sep_token_id not in ids
        assert columns["token_id"].tolist() == ids
        assert columns["is_last_prompt"].sum() == 1


def test_blip__a_model_of_the_family_that_was_not_shown_is_refused(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    other = grown(HUB.BlipModel(loaded.model.config), loaded.processor, "blip")
    asked = Listed(samples(ZOO["blip"]))
    with pytest.raises(ModelError, match="BlipModel: of BLIP's models only BlipForConditionalGeneration"):
        capture_run(other, asked, tmp_path / "run", max_new_tokens=0, quiet=True)
    assert not (tmp_path / "run").exists()
