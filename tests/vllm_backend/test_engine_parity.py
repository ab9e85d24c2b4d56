"""Every site of every family, through vLLM's own class, is what transformers computes: the whole run equals.

Prompts are forced into chunks of 16 tokens, requests are of unequal lengths and end at different times, and
answers come out of decode steps, where the reference has one forward over prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import ANSWER, samples, sites
from same_runs import assert_same_runs
from tiny_models import Listed

from mechanistic.capture.job import capture_run
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run, site
from mechanistic.store.info import format_info, run_info
from mechanistic.store.schema import KIND

OWN_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
CHUNKS = {"max_num_batched_tokens": 16}


@pytest.mark.parametrize("name", OWN_CLASSES)
def test_vllm__is_what_transformers_computes(
    name: str, zoo: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    loaded = engine(zoo / name, **CHUNKS)
    path = tmp_path / "run"
    capture_run(
        loaded,
        Listed(samples(name)),
        path,
        sites=sites(name),
        batch_size=6,
        max_new_tokens=ANSWER,
        quiet=True,
    )
    errors = assert_same_runs(zoo / f"{name}-run", path)
    run = open_run(path)
    assert run.attrs["model"]["engine_class"] == OWN_CLASSES[name]
    assert run.attrs["model"]["backend"] == "vllm"
    assert not run.attrs["proven"]["warnings"]
    # Enough was compared to mean something.
    assert len(errors) > 30
    assert max(errors.values()) > 0


def test_vllm__runs_transformers_own_classes(zoo: Path, tmp_path: Path, engine: Callable[..., Any]) -> None:
    loaded = engine("spatial-tiny", **CHUNKS)
    path = tmp_path / "run"
    capture_run(loaded, Shapes(6), path, sites=sites("spatial-tiny"), max_new_tokens=ANSWER, quiet=True)
    assert_same_runs(zoo / "spatial-tiny-run", path)
    assert open_run(path).attrs["model"]["engine_class"] == "TransformersMultiModalForCausalLM"


def test_vllm__a_mask_that_is_not_the_models_own_is_said(
    zoo: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    loaded = engine(zoo / "gemma3")
    path = tmp_path / "run"
    data = Listed(samples("gemma3")[:2])
    capture_run(loaded, data, path, sites=["text.*.resid_post"], max_new_tokens=0, quiet=True)
    (warning,) = open_run(path).attrs["proven"]["warnings"]
    assert warning.startswith("2 of 2 layers attend causally on this engine (CPU_ATTN)")
    assert f"WARNING  {warning}" in format_info(run_info(path))
    own, other = (site(open_run(each), "text/resid_post").load() for each in (zoo / "gemma3-run", path))
    first = [ds.isel(token=(ds.sample_index == 0) & (ds.kind != KIND["answer"])) for ds in (own, other)]
    apart = np.abs(first[0].resid_post.values - first[1].resid_post.values).max((0, 2))
    image = first[0].kind.values == KIND["image"]
    # What comes before the image is the same; inside it, only the very last token sees all of it either way.
    assert apart[: image.argmax()].max() < 1e-4
    assert apart[image].max() > 1e-2
