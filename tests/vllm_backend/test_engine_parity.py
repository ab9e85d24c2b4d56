"""The contract of all backends, through vLLM's own classes; and the whole run equals the one of transformers.

Prompts are forced into chunks of 16 tokens, requests are of unequal lengths and end at different times, and
answers come out of decode steps, where the other backend has one forward over prompt and answer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_contract import CaptureContract, Captured
from conftest import starting
from engine_models import FAMILIES, MODELS, dataset, sites
from library_alone import ANSWER
from same_runs import assert_same_runs

from mechanistic.capture.job import capture_run
from mechanistic.store import open_run, site
from mechanistic.store.info import format_info, run_info
from mechanistic.store.schema import KIND

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "spatial-tiny": "TransformersMultiModalForCausalLM",
}


def capture(name: str, zoo: Path, path: Path, **options: Any) -> Captured:
    """Everything of a model through an engine, with the reference."""
    settings: dict[str, Any] = {"batch_size": 6, "max_new_tokens": ANSWER, "quiet": True}
    with starting() as load:
        loaded = load(zoo / name if name in MODELS else name, **options)
        capture_run(loaded, dataset(name), path, sites=sites(name), **settings)
    reference = torch.load(zoo / f"{name}-alone.pt", weights_only=False)
    return Captured(FAMILIES[name], loaded, path, open_run(path), *reference)


@pytest.fixture(scope="module", params=CLASSES)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Captured:
    path = tmp_path_factory.mktemp("runs") / request.param
    return capture(request.param, zoo, path, max_num_batched_tokens=16)


class TestVllm(CaptureContract):
    """Every site of every family."""

    def test_vllm__run_equals_that_of_transformers(self, captured: Captured, zoo: Path) -> None:
        name = captured.path.name
        errors = assert_same_runs(zoo / f"{name}-run", captured.path)
        assert captured.run.attrs["model"]["backend"] == "vllm"
        assert captured.run.attrs["model"]["engine_class"] == CLASSES[name]
        assert not captured.run.attrs["proven"]["warnings"]
        # Enough was compared to mean something.
        assert len(errors) > 30
        assert max(errors.values()) > 0


def test_vllm__a_mask_that_is_not_the_models_own_is_said(zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    captured = capture("gemma3", zoo, path)
    (warning,) = captured.run.attrs["proven"]["warnings"]
    assert warning.startswith("2 of 2 layers attend causally on this engine (CPU_ATTN)")
    assert f"WARNING  {warning}" in format_info(run_info(path))
    own, other = (site(open_run(each), "text/resid_post").load() for each in (zoo / "gemma3-run", path))
    first = [ds.isel(token=(ds.sample_index == 0) & (ds.kind != KIND["answer"])) for ds in (own, other)]
    apart = np.abs(first[0].resid_post.values - first[1].resid_post.values).max((0, 2))
    image = first[0].kind.values == KIND["image"]
    # What comes before the image is the same; inside it, only the very last token sees all of it either way.
    assert apart[: image.argmax()].max() < 1e-4
    assert apart[image].max() > 1e-2
    # The encoder is the model's own all the same.
    stacks = {"vision": captured.family.layers["vision"]}
    captured.family = replace(captured.family, layers=stacks, masks={"vision": ["per_image"]})
    contract = CaptureContract()
    contract.test_contract__every_number_has_its_layer_token_and_head(captured)
    contract.test_contract__residuals_are_the_layers_inputs_and_outputs(captured)
    contract.test_contract__attention_from_q_and_k_is_the_librarys_eager_attention(captured)
    contract.test_contract__head_outputs_and_values_are_the_librarys(captured)
    contract.test_contract__halves_of_a_layer_are_what_its_modules_give(captured)
    contract.test_contract__what_was_proven_is_in_the_run(captured)
