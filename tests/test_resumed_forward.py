"""A forward that starts at a layer ends where the whole one does, in every family."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import ZOO, samples

from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.prompts import Inputs
from mechanistic.capture.resumed_forward import (
    ResumedForward,
    check_error,
    joined_inputs,
    prove_resumed_forward,
    without_pixels,
)
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import CaptureError, SpecificationError

FAMILIES = (
    "llama",
    "gpt2",
    "gemma2",
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "internvl",
    "paligemma",
    "llava_onevision",
)
# Layers that attend to the image, and a model that takes no call without it.
SEE_ALWAYS = ("mllama", "blip", "blip2")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def alone(loaded: LoadedModel, name: str) -> list[Inputs]:
    """The inputs of three samples of unequal lengths, each encoded by itself."""
    texts = TokenTexts(loaded.tokenizer)
    return [
        prepare_batch(loaded, [each], 0, max_new_tokens=0, texts=texts).inputs
        for each in samples(ZOO[name])[:3]
    ]


def watched(loaded: LoadedModel, path: str, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """What goes into each layer of a plain forward, and its logits, by nothing but the library."""
    entered: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        entered.append((args[0] if args else kwargs["hidden_states"]).clone())

    with ExitStack() as hooks, torch.no_grad():
        for layer in loaded.model.get_submodule(path):
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        return entered, loaded.model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", [*FAMILIES, *SEE_ALWAYS])
def test_resumed_forward__equals_the_plain_one_from_every_layer(name: str) -> None:
    loaded = ZOO[name].build()
    # As many images each.
    single = alone(loaded, name)[:: 2 if name == "mllama" else 1]
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, single[:1]))
    inputs, last = joined_inputs(loaded, single, images=resumed.needs_images(0))
    assert max(resumed.error) <= 1e-5
    # Each sample alone, through the library: another batch, no padding.
    reference = [watched(loaded, ZOO[name].layers["text"], each) for each in single]
    depth = len(reference[0][0])
    for layer in range(depth):
        hidden = torch.zeros(*inputs["input_ids"].shape, reference[0][0][0].shape[-1])
        for row, (entered, _) in enumerate(reference):
            hidden[row, : entered[layer].shape[1]] = entered[layer][0]
        with torch.no_grad():
            got = resumed.logits(inputs, last, layer, hidden)
        for row, (_, logits) in enumerate(reference):
            scale = float(logits.abs().max())
            torch.testing.assert_close(got[row], logits[0, -1], rtol=0, atol=1e-5 * scale)
    assert resumed.needs_images(0) == (name in ("qwen3_vl", *SEE_ALWAYS))
    assert resumed.needs_images(1) == (name in SEE_ALWAYS)


def test_resumed_forward__runs_neither_the_image_tower_nor_lower_layers() -> None:
    loaded = ZOO["llava"].build()
    inputs, last = joined_inputs(loaded, alone(loaded, "llava")[:1])
    resumed = prove_resumed_forward(loaded, inputs, last)
    entered, _ = watched(loaded, "model.language_model.layers", inputs)
    ran: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for path, module in loaded.model.named_modules():
            if path.endswith("mlp"):
                handle = module.register_forward_hook(lambda *_, path=path: ran.append(path))
                hooks.callback(handle.remove)
        resumed.logits(inputs, last, 1, entered[1])
    assert ran == ["model.language_model.layers.1.mlp"]


def test_resumed_forward__leaves_the_model_as_it_was_after_an_exception() -> None:
    loaded = ZOO["llava"].build()
    inputs, last = joined_inputs(loaded, alone(loaded, "llava")[:1])
    resumed = prove_resumed_forward(loaded, inputs, last)
    entered, before = watched(loaded, "model.language_model.layers", inputs)
    layers = loaded.model.get_submodule("model.language_model.layers")

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        resumed.logits(inputs, last, 1, entered[1])
    handle.remove()
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers)
    torch.testing.assert_close(
        watched(loaded, "model.language_model.layers", inputs)[1], before, rtol=0, atol=0
    )


def test_resumed_forward__gradients_reach_the_given_states() -> None:
    loaded = ZOO["llava"].build()
    inputs, last = joined_inputs(loaded, alone(loaded, "llava")[:1])
    resumed = prove_resumed_forward(loaded, inputs, last)
    entered, _ = watched(loaded, "model.language_model.layers", inputs)
    hidden = entered[1].clone().requires_grad_()
    resumed.logits(inputs, last, 1, hidden)[0, 3].backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0


def test_resumed_forward__says_what_is_wrong() -> None:
    loaded = ZOO["llava"].build()
    inputs, last = joined_inputs(loaded, alone(loaded, "llava")[:1])
    resumed = ResumedForward(loaded, 0, False)
    with pytest.raises(SpecificationError, match=r"no layer 9 to start at.*\n.*0 to 2"):
        resumed.logits(inputs, last, 9, torch.zeros(1, 1, 32))
    with pytest.raises(CaptureError, match=r"\(1, 1\) tokens do not fit inputs"):
        resumed.logits(inputs, last, 1, torch.zeros(1, 1, 32))
    with pytest.raises(CaptureError, match=r"misses the logits of the plain one by 0\.5 of the largest"):
        check_error(0.5, "float32", "this")
    assert "pixel_values" not in without_pixels(inputs)


def test_joined_inputs__refuses_images_that_do_not_fit_together() -> None:
    loaded = ZOO["llava"].build()
    first, second = alone(loaded, "llava")[:2]
    second = {**second, "pixel_values": second["pixel_values"][..., :3]}
    with pytest.raises(CaptureError, match=r"pixel_values have shapes"):
        joined_inputs(loaded, [first, second])
