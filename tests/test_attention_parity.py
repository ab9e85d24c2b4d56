"""Attention rebuilt from a stored and reopened run is the attention that transformers itself reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from mechanistic.analysis import attention_entropy, attention_mass, attention_pattern, sample_image
from mechanistic.store import group, open_run

SAMPLES = (0, 7, 399)


@pytest.fixture(scope="module")
def model() -> Any:
    from mechanistic.capture.models import load_model

    loaded = load_model("spatial-tiny", dtype="float32")
    loaded.model.set_attn_implementation("eager")
    return loaded


@pytest.mark.parametrize("sample", SAMPLES)
def test_attention__equals_the_eager_attentions_of_the_model(demo_run: Path, model: Any, sample: int) -> None:
    run = open_run(demo_run)
    tokens = group(run, "tokens/text")
    ids = tokens["token_id"].values[tokens["sample_index"].values == sample]
    pixels = model.processor.image_processor(sample_image(run, sample), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model.model(
            input_ids=torch.tensor(ids)[None].long(),
            pixel_values=pixels,
            output_attentions=True,
            use_cache=False,
        )
    pattern = attention_pattern(run, sample=sample).compute()
    rows = pattern["query_position"].values
    entropy = attention_entropy(run, sample=sample)["attention_entropy"].values
    mass = attention_mass(run, sample=sample)["mass_image"].values
    for layer, weights in enumerate(output.attentions):
        expected = weights[0].numpy()[:, rows]
        np.testing.assert_allclose(pattern["attention_pattern"].values[layer], expected, atol=1e-5)
        np.testing.assert_allclose(entropy[layer].T, scipy.stats.entropy(expected, axis=-1), atol=1e-4)
        image = expected[..., pattern["key_kind"].values == 1].sum(-1)
        np.testing.assert_allclose(mass[layer].T, image, atol=1e-5)
