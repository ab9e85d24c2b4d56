"""What a run holds, read back from disk, against what transformers itself reports for each sample alone.

Batches are of unequal length, the decoder has grouped key heads, and samples have one image or two; so
padding, grouping and the order of images are all in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from tiny_models import Listed, llava, samples

from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.store import open_run, site

SITES = (
    "text.*.resid_pre",
    "text.*.resid_mid",
    "text.*.resid_post",
    "text.*.attn_out",
    "text.*.mlp_out",
    "text.*.q",
    "text.*.k",
    "text.*.v",
    "text.*.z",
    "vision.*.resid_post",
    "vision.*.q",
    "vision.*.k",
    "vision.*.z",
)
COUNT = 6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def run(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    path = tmp_path_factory.mktemp("parity") / "run"
    capture_run(loaded, dataset(), path, sites=SITES, batch_size=4, max_new_tokens=3, quiet=True)
    return open_run(path)


def dataset() -> Listed:
    return Listed(samples(COUNT, images=(1, 2)))


@pytest.fixture(scope="module")
def references(loaded: LoadedModel, run: xr.DataTree) -> list[dict[str, Any]]:
    return [reference(loaded, run, number) for number in range(COUNT)]


def reference(loaded: LoadedModel, run: xr.DataTree, number: int) -> dict[str, Any]:
    """One sample alone, through eager attention, with the library's own outputs and plain hooks."""
    model: Any = loaded.model
    table = run["tokens/text"].to_dataset()
    ids = table.token_id.values[table.sample_index.values == number]
    images = list(dataset()[number].images)
    pixels = loaded.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    kept: dict[str, list[Any]] = {"z": [], "attn_out": [], "mlp_out": [], "pre": [], "post": []}
    handles = []
    for layer in model.model.language_model.layers:
        watch = layer.self_attn.o_proj.register_forward_pre_hook
        handles.append(watch(lambda _, args: kept["z"].append(args[0][0])))
        handles.append(
            layer.self_attn.register_forward_hook(lambda _, a, out: kept["attn_out"].append(out[0][0]))
        )
        handles.append(layer.mlp.register_forward_hook(lambda _, a, out: kept["mlp_out"].append(out[0])))
        handles.append(layer.register_forward_pre_hook(lambda _, args: kept["pre"].append(args[0][0])))
        handles.append(layer.register_forward_hook(lambda _, a, out: kept["post"].append(out[0])))
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(ids)[None].long(),
                pixel_values=pixels,
                output_hidden_states=True,
                output_attentions=True,
                use_cache=False,
            )
            vision = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    return {"output": output, "vision": vision, "hooks": kept}


def rows(run: xr.DataTree, name: str, number: int) -> NDArray[Any]:
    """Values (layer, row, ...) of one sample at a site of the reopened run."""
    data = site(run, name)
    here = np.flatnonzero(data.sample_index.values == number)
    values: NDArray[Any] = data[name.split("/")[1]].isel({data[name.split("/")[1]].dims[1]: here}).values
    return values


def close(got: NDArray[Any], expected: Any) -> None:
    values = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(got, values, rtol=0, atol=TOLERANCE * max(1.0, np.abs(values).max()))


@pytest.mark.parametrize("number", range(COUNT))
def test_capture__residuals_are_transformers_hidden_states(
    loaded: LoadedModel, run: xr.DataTree, references: list[dict[str, Any]], number: int
) -> None:
    states = references[number]["output"].hidden_states
    pre, post = rows(run, "text/resid_pre", number), rows(run, "text/resid_post", number)
    for layer in range(len(states) - 1):
        close(pre[layer], states[layer][0])
        if layer + 1 < len(states) - 1:
            close(post[layer], states[layer + 1][0])
    # The last entry of the library's hidden states has been through the final norm.
    norm = loaded.anatomy.final_norm
    assert norm is not None
    with torch.no_grad():
        close(norm(torch.from_numpy(post[-1])).numpy(), states[-1][0])


@pytest.mark.parametrize("number", range(COUNT))
def test_capture__patterns_from_q_and_k_are_eager_attentions(
    run: xr.DataTree, references: list[dict[str, Any]], number: int
) -> None:
    for stack, reported in (
        ("text", references[number]["output"].attentions),
        ("vision", references[number]["vision"].attentions),
    ):
        q, k = rows(run, f"{stack}/q", number), rows(run, f"{stack}/k", number)
        rules = site(run, f"{stack}/q").attrs["attention"]
        for layer, weights in enumerate(reported):
            rule = rules[str(layer)]
            images = weights.shape[0]
            for image in range(images):
                part = slice(image * q.shape[1] // images, (image + 1) * q.shape[1] // images)
                close(pattern(q[layer, part], k[layer, part], rule), weights[image])


def pattern(q: NDArray[Any], k: NDArray[Any], rule: dict[str, Any]) -> NDArray[Any]:
    """Attention (head, query, key) as FORMAT.md says to rebuild it."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * rule["scale"]
    if rule["mask"] == "causal":
        scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    else:
        assert rule["mask"] == "per_image"
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("number", range(COUNT))
def test_capture__inner_sites_are_the_modules_outputs(
    run: xr.DataTree, references: list[dict[str, Any]], number: int
) -> None:
    hooks = references[number]["hooks"]
    for layer in range(3):
        attention, mlp = rows(run, "text/attn_out", number)[layer], rows(run, "text/mlp_out", number)[layer]
        close(attention, hooks["attn_out"][layer])
        close(mlp, hooks["mlp_out"][layer])
        close(rows(run, "text/resid_mid", number)[layer], hooks["pre"][layer] + hooks["attn_out"][layer])
        z = rows(run, "text/z", number)[layer]
        close(z.reshape(len(z), -1), hooks["z"][layer])
        close(rows(run, "text/resid_pre", number)[layer] + attention + mlp, hooks["post"][layer])


@pytest.mark.parametrize("number", range(COUNT))
def test_capture__vision_residuals_are_the_towers_hidden_states(
    run: xr.DataTree, references: list[dict[str, Any]], number: int
) -> None:
    states = references[number]["vision"].hidden_states
    post = rows(run, "vision/resid_post", number)
    for layer in range(len(states) - 1):
        close(post[layer], states[layer + 1].flatten(0, 1))


@pytest.mark.parametrize("number", range(COUNT))
def test_capture__option_logits_and_the_readout_are_the_models_own(
    loaded: LoadedModel, run: xr.DataTree, references: list[dict[str, Any]], number: int
) -> None:
    table, held = run["tokens/text"].to_dataset(), run["samples"].to_dataset()
    here = table.isel(token=np.flatnonzero(table.sample_index.values == number))
    last = int(np.flatnonzero(here.is_last_prompt.values)[0])
    logits = references[number]["output"].logits[0, last]
    options = dataset()[number].options
    expected = [float(logits[loaded.tokenizer.convert_tokens_to_ids(option)]) for option in options]
    close(held.option_logits.values[number], np.array(expected))
    readout = run["readout"].to_dataset()
    residual = site(run, "text/resid_post_last").resid_post_last.values[-1, number]
    normed = (
        residual / np.sqrt((residual**2).mean() + readout.attrs["eps"]) * readout.final_norm_weight.values
    )
    words = {
        str(word): value
        for word, value in zip(readout.word.values, readout.unembed.values @ normed, strict=True)
    }
    close(np.array([words[option] for option in options]), np.array(expected))


def test_capture__answers_are_what_generate_gives(loaded: LoadedModel, run: xr.DataTree) -> None:
    table, held = run["tokens/text"].to_dataset(), run["samples"].to_dataset()
    for number, sample in enumerate(dataset().samples):
        prompt = str(held.prompt.values[number])
        inputs = loaded.processor(text=[prompt], images=list(sample.images), return_tensors="pt")
        with torch.no_grad():
            out = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
        answer = [int(t) for t in out[inputs["input_ids"].shape[1] :] if int(t) not in (0, 3)]
        here = table.isel(token=np.flatnonzero(table.sample_index.values == number))
        assert here.token_id.values[here.kind.values == 3].tolist() == answer
        assert here.position.values.tolist() == list(range(here.sizes["token"]))
