"""Attribution patching: exact where the model is linear, against a plain port elsewhere, planted truth."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_built import AT_COLOUR, AT_LAST, FIRST, ONLY, SECOND, one_head, pairs, two_steps
from tiny_models import llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import attribution_patching
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, ModelError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PAIRS = [(0, 1), (2, 3)]
PLAIN: dict[str, Any] = {"quiet": True, "min_difference": 0.0}


def image_pair() -> list[Any]:
    """The same question about two images of noise."""
    data = samples(8)
    return [data[0], replace(data[4], answer="right", relation="right")]


@pytest.mark.parametrize("method", ["gradient", "integrated"])
@pytest.mark.parametrize("site", ["z", "v", "resid_post", "mlp_out"])
def test_attribution_patching__is_exact_on_a_linear_model(site: str, method: str) -> None:
    got = attribution_patching(
        pairs(2), one_head(linear=True), site=site, method=method, pairs=PAIRS, top=1000, quiet=True
    )
    assert np.isfinite(got.exact).all()
    np.testing.assert_allclose(got.attribution, got.exact, atol=1e-4)


def test_attribution_patching__names_the_planted_head_and_position() -> None:
    heads = attribution_patching(pairs(2), one_head(), pairs=PAIRS, top=1, quiet=True)
    expected = np.zeros((3, 1, 4))
    expected[ONLY[0], 0, ONLY[1]] = 1
    np.testing.assert_allclose(heads.share, expected, atol=0.01)
    assert float(heads.exact_share[ONLY[0], 0, ONLY[1]]) == pytest.approx(1, abs=0.01)
    assert int(np.isfinite(heads.exact_share).sum()) == 1
    places = list(range(AT_LAST + 1))
    stream = attribution_patching(
        pairs(2), one_head(), site="resid_post", places=places, pairs=PAIRS, quiet=True
    )
    expected = np.zeros((3, len(places)))
    expected[: ONLY[0], AT_COLOUR] = 1
    expected[ONLY[0] :, AT_LAST] = 1
    np.testing.assert_allclose(stream.share, expected, atol=0.01)


def test_attribution_patching__names_both_planted_steps_through_values() -> None:
    got = attribution_patching(pairs(2), two_steps("v"), pairs=PAIRS, direction="noise", quiet=True)
    strong = {(int(layer), int(head)) for layer, _, head in np.argwhere(np.abs(got.share.values) > 0.01)}
    assert strong == {FIRST, SECOND}


@pytest.mark.parametrize("via", ["q", "k"])
def test_attribution_patching__shows_beside_it_what_a_saturated_softmax_hides(via: str) -> None:
    got = attribution_patching(pairs(2), two_steps(via), pairs=PAIRS, top=12, quiet=True)
    first = {"layer": FIRST[0], "head": FIRST[1], "place": "all"}
    assert abs(float(got.share.sel(first))) < 0.01
    assert float(got.exact_share.sel(first)) == pytest.approx(1, abs=0.01)
    assert float(got.correlation) < 0.9


@pytest.mark.parametrize("steps", [0, 3])
def test_attribution_patching__is_the_papers_definition(steps: int) -> None:
    """Plain hooks and autograd: (x_clean - x) . mean gradient, patched into the corrupt run."""
    model, given = llava(), image_pair()
    how = {"method": "integrated", "steps": steps} if steps else {}
    got = attribution_patching(given, model, pairs=[(0, 1)], **how, **PLAIN)
    layers = model.model.model.language_model.layers
    words = [model.tokenizer.convert_tokens_to_ids(sample.answer) for sample in given]

    def run(sample: Any, start: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        batch = prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
        seen: list[torch.Tensor] = []
        entered: list[torch.Tensor] = []

        def enter(_: Any, args: Any) -> Any:
            entered.append(args[0] if start is None else start)
            return (entered[-1], *args[1:])

        with ExitStack() as hooks:
            hooks.callback(layers[0].register_forward_pre_hook(enter).remove)
            for layer in layers:

                def keep(_: Any, args: Any) -> None:
                    args[0].retain_grad()
                    seen.append(args[0])

                hooks.callback(layer.self_attn.o_proj.register_forward_pre_hook(keep).remove)
            logits = model.model(**to_device(batch.inputs, model.model)).logits[0, -1]
        return logits[words[0]] - logits[words[1]], seen, entered[0].detach()

    _, clean, clean_input = run(given[0], None)
    _, corrupt, corrupt_input = run(given[1], None)
    shares = [step / steps for step in range(1, steps + 1)] or [0.0]
    slopes = [torch.zeros_like(each) for each in clean]
    for share in shares:
        metric, seen, _ = run(given[1], corrupt_input + share * (clean_input - corrupt_input))
        metric.backward()
        slopes = [slope + each.grad / len(shares) for slope, each in zip(slopes, seen, strict=True)]
    model.model.zero_grad()
    for layer, (a, b, slope) in enumerate(zip(clean, corrupt, slopes, strict=True)):
        expected = ((a - b) * slope).detach()[0].unflatten(-1, (4, -1)).sum((0, 2))
        np.testing.assert_allclose(got.attribution[0, layer, 0], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_attribution_patching__works_on_every_kind_of_decoder_and_leaves_it_as_it_was(name: str) -> None:
    family = ZOO[name]
    model, (sample, *_) = family.build(), zoo_samples(family)
    other = replace(sample, answer="right", question=sample.question.replace("red", "green"))
    before = [parameter.requires_grad for parameter in model.model.parameters()]
    got = attribution_patching([sample, other], model, site="k", pairs=[(0, 1)], top=2, **PLAIN)
    assert got.attribution.dims == ("pair", "layer", "place", "kv_head")
    assert np.isfinite(got.attribution).all()
    assert int(np.isfinite(got.exact).sum()) == 2
    assert [parameter.requires_grad for parameter in model.model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_attribution_patching__patching_all_of_the_stream_recovers_one() -> None:
    got = attribution_patching(
        image_pair(), llava(), site="resid_pre", places=["all"], pairs=[(0, 1)], **PLAIN
    )
    np.testing.assert_allclose(got.exact_share, 1, atol=1e-4)
    noise = attribution_patching(
        image_pair(), llava(), site="resid_pre", places=["all"], pairs=[(0, 1)], direction="noise", **PLAIN
    )
    np.testing.assert_allclose(noise.exact_share, 1, atol=1e-4)


def test_attribution_patching__refuses_what_does_not_exist() -> None:
    model, given = one_head(), pairs(1)
    for wrong, message in (
        ({"site": "pattern"}, "no site 'pattern' to attribute"),
        ({"method": "lime"}, "no method 'lime'"),
        ({"direction": "up"}, "no direction 'up'"),
        ({"steps": 0}, "steps=0"),
        ({"layers": [3]}, "no layer 3; the decoder has 3"),
    ):
        with pytest.raises(SpecificationError, match=message):
            attribution_patching(given, model, pairs=[(0, 1)], **wrong, **PLAIN)
    with pytest.raises(DataError, match="has no token at '@11'"):
        attribution_patching(given, model, places=[11], pairs=[(0, 1)], **PLAIN)
    qwen = ZOO["qwen3_vl"]
    with pytest.raises(ModelError, match="adds image features in higher layers too"):
        attribution_patching(zoo_samples(qwen)[:2], qwen.build(), method="integrated", **PLAIN)
