"""Models whose weights are quantised: by the very options of from_pretrained."""

from __future__ import annotations

from pathlib import Path

import pytest
from capture_contract import CaptureContract, Captured, sites_of
from library_alone import ANSWER, alone, unembedding
from tiny_models import Listed
from transformers import QuantoConfig
from zoo import ZOO, samples

from mechanistic.capture.job import capture_run
from mechanistic.capture.models import load_model
from mechanistic.store import open_run
from mechanistic.store.info import format_info, run_info


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA."""
    path = tmp_path_factory.mktemp("quantized") / "llava"
    loaded = ZOO["llava"].build()
    loaded.model.save_pretrained(path)
    loaded.processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def captured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    family = ZOO["llava"]
    eight_bits = QuantoConfig(weights="int8")
    loaded = load_model(str(folder), dtype="float32", quantization_config=eight_bits)
    asked, path = samples(family), tmp_path_factory.mktemp("run") / "run"
    capture_run(
        loaded, Listed(asked), path, sites=sites_of(family), batch_size=4, max_new_tokens=ANSWER, quiet=True
    )
    run = open_run(path)
    prompts = run["samples"].to_dataset().prompt.values
    seen = [alone(family, loaded, str(prompt), each) for prompt, each in zip(prompts, asked, strict=True)]
    return Captured(family, loaded, path, run, seen, unembedding(family, loaded))


class TestWeightsOfEightBits(CaptureContract):
    """A model whose weights are kept in 8 bits is what the library computes with them."""

    def test_quantized__the_run_says_so(self, captured: Captured) -> None:
        assert "quantization quanto" in format_info(run_info(captured.path))
        assert "head_readout" in captured.run["readout"]
