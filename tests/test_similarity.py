"""How well options fit an image: the numbers of the library itself, one caption at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from published_sets import write_controlled
from tiny_models import Listed
from zoo import ZOO, samples

from mechanistic.analysis import accuracy
from mechanistic.capture.dataset import Sample, open_image
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.whatsup import open_whatsup
from mechanistic.store import open_run

CAPTIONS = (
    "the red square is left of the blue circle",
    "the red square is right of the blue circle",
    "the red square",
)
COMPARING = ("blip_matching", "clip", "siglip")


def asked(name: str) -> list[Sample]:
    """One image each; options of unequal length and number, in orders of their own."""
    plain = [replace(sample, images=sample.images[:1]) for sample in samples(ZOO[name])]
    return [
        replace(sample, options=CAPTIONS[: 2 + number % 2][:: 1 - 2 * (number // 2)], answer=CAPTIONS[0])
        for number, sample in enumerate(plain)
    ]


def captured(loaded: LoadedModel, given: list[Sample], path: Path) -> xr.DataTree:
    capture_run(
        loaded,
        Listed(tuple(given)),
        path,
        sites=["text.*.resid_post[last]"],
        batch_size=4,
        max_new_tokens=0,
        quiet=True,
    )
    return open_run(path)


def librarys(name: str, loaded: LoadedModel, sample: Sample, caption: str) -> float:
    """The image with one caption: a logit of the model, or of the probability that BLIP gives a match."""
    given: dict[str, Any] = {"text": [caption], "images": [sample.images[0]], **ZOO[name].text}
    with torch.no_grad():
        out = loaded.model(**loaded.processor(**given, return_tensors="pt"))
    if "itm_score" in out:
        return float(torch.logit(out.itm_score.double().softmax(1)[0, 1]))
    return float(out.logits_per_image[0, 0])


@pytest.mark.parametrize("name", COMPARING)
def test_similarity__of_each_option_is_the_librarys_of_the_caption_alone(name: str, tmp_path: Path) -> None:
    loaded, given = ZOO[name].build(), asked(name)
    table = captured(loaded, given, tmp_path / "run")["samples"].to_dataset()
    right = []
    for row, sample in enumerate(given):
        expected = np.array([librarys(name, loaded, sample, option) for option in sample.options])
        got = table.option_logits.values[row]
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=0, atol=1e-5 * abs(expected).max())
        assert np.isnan(got[len(expected) :]).all()
        best = sample.options[int(expected.argmax())]
        assert table.prediction.values[row] == best
        right.append(best == sample.answer)
    assert set(table.option_note.values.tolist()) == {""}
    assert table.correct.values.tolist() == right
    for scored in ("answer", "logits"):
        found = accuracy(table, scored=scored).sel(unit="individual")  # type: ignore[arg-type]
        assert (found["n"].item(), found["accuracy"].item()) == (len(given), np.mean(right))


def test_similarity__of_captions_is_scored_as_whatsup_does(tmp_path: Path) -> None:
    loaded = ZOO["blip_matching"].build()
    annotations = write_controlled(tmp_path) / "data/controlled_images_dataset.json"
    # In words that the tokenizer knows: captions of unknown ones are all alike.
    known = annotations.read_text().replace(" on a ", " above a ").replace(" under a ", " below a ")
    annotations.write_text(known)
    dataset = open_whatsup("Controlled_Images_A", tmp_path, task="caption")
    capture_run(loaded, dataset, tmp_path / "run", sites=["text.*.xq"], max_new_tokens=0, quiet=True)
    run = open_run(tmp_path / "run")
    right = {}
    for sample in dataset:
        # As its published code does: one forward a caption, and the likeliest match.
        plain = replace(sample, images=(open_image(sample.images[0]),))
        chances = [librarys("blip_matching", loaded, plain, caption) for caption in sample.options]
        right[sample.sample_id] = sample.options[int(np.argmax(chances))] == sample.answer
    sets = [
        [right[each.sample_id] for each in dataset if each.group == name]
        for name in {each.group for each in dataset}
    ]
    found = accuracy(run)
    xr.testing.assert_equal(found, accuracy(run, scored="logits"))
    assert found["n"].values.tolist() == [8, 4, 2]
    assert found["accuracy"].sel(unit="individual").item() == np.mean(list(right.values()))
    assert found["accuracy"].sel(unit="set").item() == np.mean([all(each) for each in sets])
    np.testing.assert_allclose(found["chance_accuracy"], [1 / 4, 1 / 16, 1 / 256])


def test_similarity__a_sample_of_several_images_has_none_and_says_why(tmp_path: Path) -> None:
    given = [*asked("clip")[:1], *samples(ZOO["clip"])[1:2]]
    table = captured(ZOO["clip"].build(), given, tmp_path / "run")["samples"].to_dataset()
    assert np.isfinite(table.option_logits.values[0, :2]).all()
    assert np.isnan(table.option_logits.values[1]).all()
    assert table.prediction.values[1] == ""
    assert table.correct.values[1] == -1
    assert table.option_note.values.tolist() == ["", "compared with one image, and there are 2"]


def test_similarity__of_options_that_fit_equally_none_is_chosen(tmp_path: Path) -> None:
    # Two words that the tokenizer does not know are one to the model.
    sample = replace(asked("clip")[0], options=("a qoph", "a zayin"), answer="a qoph")
    other = replace(asked("clip")[1], answer=None)
    table = captured(ZOO["clip"].build(), [sample, other], tmp_path / "run")["samples"].to_dataset()
    first, second = table.option_logits.values[0, :2]
    assert first == second
    assert (table.prediction.values[0], table.correct.values.tolist()) == ("", [0, -1])


def test_similarity__an_option_too_long_for_the_model_fails_its_sample_alone(tmp_path: Path) -> None:
    first, second = asked("clip")[:2]
    long = replace(second, options=(*second.options, "red " * 50), answer=None)
    run = captured(ZOO["clip"].build(), [first, long], tmp_path / "run")
    table = run["samples"].to_dataset()
    assert table.status.values.tolist() == [0, 1]
    assert table.error.values[1].startswith("Option 'red red ")
    assert "as a caption: sample 's1': its prompt has 52 tokens; this model reads 40" in table.error.values[1]
