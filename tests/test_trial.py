"""Trials: the same numbers however a forward is started, copied or batched; what is refused; nothing left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_models import Listed, llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import ablate, attention_knockout, causal_tracing, path_patching
from mechanistic.capture import capture_run
from mechanistic.capture.interventions import Add, Edit, Scale
from mechanistic.capture.residual import Halves
from mechanistic.capture.trial import first_layer, prepare_trial
from mechanistic.store import group, open_run
from mechanistic.store.derived import write_derived
from mechanistic.store.errors import DataError, ModelError, SpecificationError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

DECODERS = ("llama", "gpt2", "gemma2", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "internvl")
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")


@pytest.mark.parametrize("name", DECODERS)
def test_trial__starts_in_the_middle_with_the_same_result(name: str) -> None:
    family = ZOO[name]
    trial = prepare_trial(family.build(), zoo_samples(family)[:2])
    assert trial.resumed is not None
    noise = Edit("text", 0, "resid_pre", Scale(1.1))
    with torch.no_grad():
        for base, copies in (((), 1), ((noise,), 2)):
            known, logits = trial.known(base, copies)
            torch.testing.assert_close(logits, trial.logits(base, copies), atol=0, rtol=0)
            for site in SITES:
                edit = Edit("text", 1, site, Scale(0.5))
                got, expected = known.logits([edit], copies), trial.logits([*base, edit], copies)
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
            lower = Edit("text", 0, "resid_pre", Scale(0.9))
            torch.testing.assert_close(known.logits([lower], copies), trial.logits([*base, lower], copies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trial__starts_in_the_middle_in_half_precision(dtype: torch.dtype) -> None:
    trial = prepare_trial(llava(dtype=dtype), samples(2))
    with torch.no_grad():
        known, logits = trial.known()
        for site in ("z", "mlp_out", "resid_post"):
            edit = Edit("text", 2, site, Scale(0.5))
            got, expected = known.logits([edit]), trial.logits([edit])
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, atol=0.02 * float(logits.abs().max()), rtol=0)


def test_trials__find_out_about_images_where_there_are_any() -> None:
    family = ZOO["qwen3_vl"]
    first, second, *_ = zoo_samples(family)
    model = family.build()
    words = prepare_trial(model, [replace(first, images=())])
    shown = prepare_trial(model, [second], like=words)
    assert words.resumed is not None
    assert shown.resumed is not None
    assert (words.resumed.image_layers, shown.resumed.image_layers) == (0, 1)
    mixed = ablate([replace(first, images=()), second], model, method="zero", batch_size=1, quiet=True)
    alone = ablate([second], model, method="zero", quiet=True)
    np.testing.assert_allclose(mixed.ablated[1], alone.ablated[0], atol=1e-5)


def test_first_layer__leaves_room_below_what_is_measured_from_a_layers_input() -> None:
    def edit(layer: int, site: str, stack: str = "text") -> Edit:
        return Edit(stack, layer, site, Scale(1.0))

    added, measured = Halves("attn", "mlp", True), Halves("attn", "mlp", True, "norm")
    for halves in (added, measured, None):
        assert first_layer([edit(3, "z"), edit(2, "resid_post")], halves) == 2
        assert first_layer([edit(2, "q"), edit(2, "resid_mid")], halves) == 1
        assert first_layer([edit(0, "resid_pre")], halves) == -1
        assert first_layer([], halves) is None
        assert first_layer([edit(1, "z"), edit(0, "z", "vision")], halves) is None
    assert first_layer([edit(3, "z"), edit(2, "mlp_out")], added) == 2
    assert first_layer([edit(3, "z"), edit(2, "mlp_out")], measured) == 1


def test_trial__copies_and_padding_do_not_matter() -> None:
    model, data = llava(), samples(4)
    trial = prepare_trial(model, data)
    with torch.no_grad():
        once, thrice = trial.measure("prob"), trial.measure("prob", copies=3)
        alone = [prepare_trial(model, [sample]).measure("prob")[0, 0] for sample in data]
    torch.testing.assert_close(thrice, once.expand(3, -1))
    torch.testing.assert_close(once[0], torch.stack(alone))


def test_trial__measures_by_hand() -> None:
    model, data = llava(), samples(2)
    trial = prepare_trial(model, data, foils=["below", None])
    with torch.no_grad():
        logits = trial.logits()
    ids = {word: model.tokenizer.convert_tokens_to_ids(word) for word in data[0].options}
    first = logits[0, ids["left"]] - logits[0, ids["below"]]
    others = torch.stack([logits[1, ids[word]] for word in ("left", "above", "below")])
    expected = torch.stack([first, logits[1, ids["right"]] - others.mean()])
    torch.testing.assert_close(trial.metric_of(logits, "logit_diff")[0], expected)
    prob = logits.softmax(-1)[[0, 1], [ids["left"], ids["right"]]]
    torch.testing.assert_close(trial.metric_of(logits, "prob")[0], prob)
    torch.testing.assert_close(trial.metric_of(logits, "log_prob")[0], prob.log())
    short = prepare_trial(model, [data[0], replace(data[1], options=("right", "left"))])
    assert np.isnan(short.option_logits(logits)[0].numpy()).sum() == 2


def test_trial__an_exception_leaves_the_model_as_it_was() -> None:
    trial = prepare_trial(llava(), samples(2))

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle")

    had = hooks(trial.loaded.model)
    with torch.no_grad():
        known, before = trial.known()
        for edit in (Edit("text", 1, "z", fail), Edit("text", 1, "mlp_out", fail)):
            for each in (trial, known):
                with pytest.raises(RuntimeError, match="in the middle"):
                    each.logits([edit])
        assert torch.equal(trial.logits(), before)
    assert hooks(trial.loaded.model) == had


def hooks(model: torch.nn.Module) -> int:
    """How many are on its modules; the library leaves some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_trial__gradients_flow_through_a_forward_that_starts_in_the_middle() -> None:
    trial = prepare_trial(llava(), samples(2))
    with torch.no_grad():
        known, _ = trial.known()
    slopes = []
    for each in (trial, known):
        push = torch.zeros(32, requires_grad=True)
        value = each.measure("logit_diff", [Edit("text", 1, "resid_post", Add(push))]).sum()
        slopes.append(torch.autograd.grad(value, push)[0])
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-5, rtol=1e-4)


def test_prepare_trial__refuses_what_cannot_be_measured() -> None:
    model, data = llava(), samples(1)
    with pytest.raises(SpecificationError, match="no metric 'accuracy'"):
        prepare_trial(model, data, metric="accuracy")
    with pytest.raises(DataError, match="has no right answer"):
        prepare_trial(model, [replace(data[0], answer=None)])
    with pytest.raises(DataError, match="has no other option than its answer 'left'"):
        prepare_trial(model, [replace(data[0], options=("left",))])
    with pytest.raises(DataError, match="cannot be told apart by one token"):
        prepare_trial(model, [replace(data[0], options=("left", "giraffe"))])
    with pytest.raises(ModelError, match="computes in float64"):
        prepare_trial(llava(dtype=torch.float64), data)
    for name in ("clip", "blip_matching"):
        with pytest.raises(ModelError, match=r"gives no logits of words.*\n.*gradcam"):
            prepare_trial(ZOO[name].build(), zoo_samples(ZOO[name])[:1])
    model.model.train()
    with pytest.raises(UsageError, match="training mode"):
        prepare_trial(model, data)


def test_experiments__take_a_run_and_their_results_are_stored_with_it(tmp_path: Path) -> None:
    model, data = llava(), Listed(tuple(samples(8)[place] for place in (0, 4)))
    capture_run(
        model, data, tmp_path / "run", sites=["text.*.resid_post[last]"], max_new_tokens=1, quiet=True
    )
    run = open_run(tmp_path / "run")
    results: dict[str, xr.Dataset] = {}
    for name, source in (("from_run", run), ("from_list", data)):
        results[name] = ablate(source, model, site="mlp_out", method="zero", quiet=True)
    np.testing.assert_allclose(results["from_run"].effect, results["from_list"].effect, atol=1e-6)
    assert results["from_run"].attrs["run_id"] == run.attrs["run_id"]
    assert results["from_run"].attrs["dataset"] == results["from_list"].attrs["dataset"] == "listed"
    how: dict[str, Any] = {"quiet": True}
    results |= {
        "traced": causal_tracing(run, model, noise_samples=1, sites=["resid_post"], **how),
        "knocked_out": attention_knockout(run, model, **how),
        "paths": path_patching(run, model, pairs=[(0, 1)], senders=[(0, 0)], min_difference=0.0, **how),
    }
    for name, result in results.items():
        for variable in result.data_vars.values():
            assert variable.attrs.get("long_name"), variable.name
        write_derived(tmp_path / "run", name, result)
    stored = open_run(tmp_path / "run")
    for name, result in results.items():
        read = group(stored, f"derived/{name}").compute()
        for variable in result.data_vars:
            np.testing.assert_array_equal(read[variable].values, result[variable].values)
