"""Causal tracing: ROME's definition ported plainly, what was planted, and every kind of decoder."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_built import AT_COLOUR, AT_LAST, ONLY, one_head, pairs
from numpy.typing import NDArray
from tiny_models import Listed, llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import causal_tracing, plot_causal_tracing
from mechanistic.analysis.intervals import bootstrap_interval
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.decoder_inputs import DecoderInputs, changed_decoder_inputs
from mechanistic.capture.forward_progress import ForwardProgress
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PLAIN: dict[str, Any] = {"quiet": True, "noise_samples": 3}
MODULES = {"attn_out": "self_attn", "mlp_out": "mlp"}


def one_token(
    model: LoadedModel, sample: Any
) -> tuple[dict[str, torch.Tensor], dict[str, NDArray[Any]], int]:
    """Inputs of one sample alone, its token labels, and its answer's token."""
    batch = prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
    answer = model.tokenizer.convert_tokens_to_ids(sample.answer)
    return to_device(batch.inputs, model.model), batch.decoder[0], answer


def trace_with_patch(
    model: LoadedModel,
    inputs: dict[str, torch.Tensor],
    states: list[tuple[int, str, list[int]]],
    noised: NDArray[np.int64],
    noise: NDArray[np.float32],
    answer: int,
) -> float:
    """`trace_with_patch` of the authors' release, with plain hooks: row 0 is clean, the others are noised.

    Each of `states` (layer, module, tokens) is taken over from row 0 by all other rows.
    """
    rows = len(noise) + 1
    layers = model.model.model.language_model.layers if hasattr(model.model.model, "language_model") else None
    layers = model.model.model.layers if layers is None else layers

    def spoil(_: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[1:, noised] += torch.from_numpy(noise)
        return (hidden, *args[1:])

    def restore(tokens: list[int]) -> Callable[..., Any]:
        def hook(_: Any, args: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[1:, tokens] = hidden[0, tokens]
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return hook

    repeated = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(layers[0].register_forward_pre_hook(spoil).remove)
        for layer, site, tokens in states:
            module = layers[layer].get_submodule(MODULES[site]) if site in MODULES else layers[layer]
            hooks.callback(module.register_forward_hook(restore(tokens)).remove)
        logits = model.model(**repeated).logits
    return float(logits[1:, -1].softmax(-1)[:, answer].mean())


@pytest.mark.parametrize(("corrupt", "window"), [("subject", 1), ("image", 2)])
def test_causal_tracing__is_the_papers_definition(corrupt: str, window: int) -> None:
    model, data = llava(), samples(3)
    scale, copies = 3.0, 2
    got = causal_tracing(
        data,
        model,
        corrupt=corrupt,
        noise_samples=copies,
        window=window,
        places=["subject", "last"],
        quiet=True,
    )
    embeddings, prepared = [], []
    for sample in data:
        inputs, labels, answer = one_token(model, sample)
        chosen = np.flatnonzero(labels["is_subject"] if corrupt == "subject" else labels["kind"] == 1)
        with torch.no_grad():
            hidden = model.model(**inputs, output_hidden_states=True).hidden_states[0][0]
        embeddings.append(hidden[chosen])
        prepared.append((inputs, labels, answer, chosen, hidden.shape[-1]))
    deviation = scale * float(torch.cat(embeddings).std())
    assert got.attrs["noise_standard_deviation"] == pytest.approx(deviation, rel=1e-5)
    for row, (inputs, labels, answer, chosen, width) in enumerate(prepared):
        drawn = [np.random.default_rng([0, row, copy]) for copy in range(copies)]
        noise = np.stack([rng.standard_normal((len(chosen), width)) * deviation for rng in drawn])
        noise = noise.astype(np.float32)
        low = trace_with_patch(model, inputs, [], chosen, noise, answer)
        assert float(got.corrupted[row]) == pytest.approx(low, abs=1e-6)
        for site in ("resid_post", "attn_out", "mlp_out"):
            wide = 1 if site == "resid_post" else window
            for layer in range(3):
                around = range(max(0, layer - wide // 2), min(3, layer - (-wide // 2)))
                for place, role in (("subject", "is_subject"), ("last", "is_last_prompt")):
                    tokens = np.flatnonzero(labels[role]).tolist()
                    states = [(number, site, tokens) for number in around]
                    value = trace_with_patch(model, inputs, states, chosen, noise, answer)
                    mine = got.restored.sel(site=site, layer=layer, place=place)[row]
                    assert float(mine) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"corruption": "mean", "corrupt": "subject", "metric": "logit_diff"},
        {"noise_scale": 0.01, "corrupt": f"@{AT_COLOUR}", "metric": "prob"},
    ],
)
def test_causal_tracing__names_the_planted_head_and_position(how: dict[str, Any]) -> None:
    places = list(range(AT_LAST + 1))
    got = causal_tracing(pairs(2), one_head(), places=places, **how, **PLAIN)
    layer, _ = ONLY
    expected = np.zeros((3, 3, len(places)))
    expected[0, :layer, AT_COLOUR] = 1
    expected[0, layer:, AT_LAST] = 1
    expected[1, layer, AT_LAST] = 1
    np.testing.assert_allclose(got.recovered.values, expected, atol=0.02)
    assert (got.average_indirect_effect_low <= got.average_indirect_effect + 1e-12).all()
    assert got.place.values.tolist() == [f"@{place}" for place in places]


def test_causal_tracing__restoring_everything_recovers_one_and_batches_do_not_matter() -> None:
    model, data = llava(), Listed(samples(5))
    whole = causal_tracing(data, model, corrupt="image", places=["all"], sites=["resid_post"], **PLAIN)
    np.testing.assert_allclose(whole.recovered.values, 1, atol=1e-4)
    alone = causal_tracing(
        data, model, corrupt="image", places=["all"], sites=["resid_post"], batch_size=1, **PLAIN
    )
    np.testing.assert_allclose(alone.corrupted, whole.corrupted, atol=1e-6)
    assert whole.attrs["dataset"] == "listed"
    assert whole.attrs["weights_sha256"] == model.weights_sha256


def test_causal_tracing__intervals_draw_sets_together() -> None:
    data = [replace(sample, group=f"set {number // 3}") for number, sample in enumerate(samples(6))]
    got = causal_tracing(data, llava(), sites=["resid_post"], places=["last"], seed=4, **PLAIN)
    values = got.indirect_effect.transpose(..., "sample").values
    clusters = np.array([sample.group for sample in data])
    low, high = bootstrap_interval(values, clusters=clusters, seed=4)
    np.testing.assert_allclose(got.average_indirect_effect_low, low)
    np.testing.assert_allclose(got.average_indirect_effect_high, high)
    np.testing.assert_allclose(got.average_indirect_effect, values.mean(-1))


def test_forward_progress__says_how_long_it_takes_still() -> None:
    stream = io.StringIO()
    progress = ForwardProgress(10, stream=stream)
    progress.advance(4, 0, lambda: 0)
    assert re.fullmatch(r"4/10 forwards  [\d.]+ forwards/s  .+ left", progress.line())
    # Half a minute is not over.
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_causal_tracing__works_on_every_kind_of_decoder_and_leaves_it_as_it_was(name: str) -> None:
    family = ZOO[name]
    model, data = family.build(), zoo_samples(family)[:2]
    inputs, _, _ = one_token(model, data[0])
    with torch.no_grad():
        before = model.model(**inputs).logits
    got = causal_tracing(
        data, model, corrupt="subject", sites=["resid_post"], places=["all"], metric="logit_diff", **PLAIN
    )
    np.testing.assert_allclose(got.restored.mean(["layer", "place", "site"]), got.clean, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model.model(**inputs).logits, before)


def test_causal_tracing__refuses_what_does_not_exist() -> None:
    model, data = llava(), samples(2)
    with pytest.raises(SpecificationError, match=r"no layer 7; the decoder has 3"):
        causal_tracing(data, model, layers=[7], **PLAIN)
    with pytest.raises(DataError, match=r"'s000' has no token at '@500', of its"):
        causal_tracing(data, model, places=[500], **PLAIN)
    with pytest.raises(DataError, match="has no token at 'subject_box'"):
        causal_tracing(data, model, places=["subject_box"], **PLAIN)
    with pytest.raises(SpecificationError, match="No state 'q' can be restored"):
        causal_tracing(data, model, sites=["q"], **PLAIN)
    with pytest.raises(SpecificationError, match="no corruption 'salt' of embeddings"):
        causal_tracing(data, model, corruption="salt", **PLAIN)
    with pytest.raises(SpecificationError, match="noise_scale=0"):
        causal_tracing(data, model, noise_scale=0.0, **PLAIN)
    with pytest.raises(SpecificationError, match="no metric 'kl'"):
        causal_tracing(data, model, metric="kl", **PLAIN)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no right answer"):
        causal_tracing([replace(data[0], answer=None)], model, **PLAIN)
    with pytest.raises(DataError, match="cannot be told apart by one token"):
        causal_tracing([replace(data[0], options=("left", "zebra"))], model, metric="logit_diff", **PLAIN)


@pytest.mark.parametrize("corruption", ["noise", "mean"])
def test_causal_tracing__spoils_image_features_of_higher_layers_too(corruption: str) -> None:
    family = ZOO["qwen3_vl"]
    model, (sample, *_) = family.build(), zoo_samples(family)
    got = causal_tracing(
        [sample],
        model,
        corrupt="image",
        corruption=corruption,
        noise_samples=1,
        sites=["resid_post"],
        places=["all"],
        quiet=True,
    )
    inputs, labels, answer = one_token(model, sample)
    image = np.flatnonzero(labels["kind"] == 1)

    def spoil(values: torch.Tensor, level: int) -> torch.Tensor:
        if corruption == "mean":
            return values.mean(0).expand(values.shape)
        seeds = [0, 0, 0, *([level] if level else [])]
        noise = np.random.default_rng(seeds).standard_normal(values.shape) * 3 * float(values.std())
        return values + torch.from_numpy(noise.astype(np.float32))

    def change(given: DecoderInputs) -> DecoderInputs:
        embeddings = given.embeddings.clone()
        embeddings[0, image] = spoil(embeddings[0, image], 0)
        deep = tuple(spoil(each, level + 1) for level, each in enumerate(given.deepstack))
        assert deep
        return DecoderInputs(embeddings, deep)

    with torch.no_grad(), changed_decoder_inputs(model.model, change):
        expected = float(model.model(**inputs).logits[0, -1].softmax(-1)[answer])
    assert float(got.corrupted[0]) == pytest.approx(expected, abs=2e-6)
    # Features that enter above the restored state stay spoiled.
    last = float(got.restored.sel(layer=1)[0, 0, 0])
    assert last == pytest.approx(float(got.clean[0]), abs=1e-6)
    assert float(got.restored.sel(layer=0)[0, 0, 0]) != pytest.approx(float(got.clean[0]), abs=1e-5)


def test_plot_causal_tracing__draws_every_site_by_layer_and_place() -> None:
    got = causal_tracing(pairs(1), one_head(), places=["subject", "last"], **PLAIN)
    figure, axes = plot_causal_tracing(got, site="resid_post")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["subject", "last"]
    assert axes.get_xlabel() == "layer"
    assert figure.axes[1].get_ylabel() == "share of the total effect recovered"
